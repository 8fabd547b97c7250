"""The values that a step is made of: sampling parameters, scheduled chunks, stop reasons. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.errors import InvalidStepError


class RequestKey(NamedTuple):
    """One placement of one request: a retry has a new attempt, and what names an old attempt is ignored. A
    tuple, as it is looked up several times for each token."""

    request_id: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.request_id}#{self.attempt}"


class StopReason(Enum):
    """Why an answer ended by itself (errors and cancellation are not stop reasons)."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class TokenSampling:
    """How the tokens of one answer are drawn and when they end.

    temperature: 0 is greedy. top_k: 0 means all. top_p: 1.0 means all. min_p: 0.0 means all.
    presence_penalty, frequency_penalty: over the answer so far; 0.0 is none. repetition_penalty: over prompt
    and answer; 1.0 is none. logit_bias: (token id, what is added to its logit).
    logprobs, prompt_logprobs: how many most likely tokens to report at each position of the answer, of the
    prompt; None means no log-probabilities at all, 0 only those of the tokens that are there.
    seed: with the token's position in the sequence the only source of randomness, so that a resumed or re-run
    request draws what it would have drawn.
    max_tokens, min_tokens: answer tokens, the first one (sampled by prefill) included.
    stop_token_ids: end the answer; never drawn before min_tokens.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop_token_ids: frozenset[int]
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def needs_history(self) -> bool:
        """Whether a draw depends on the tokens that are there already: its chunk needs a TokenHistory."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    def stop_reason(self, token_id: int, num_output_tokens: int) -> StopReason | None:
        """Why the answer ends with `token_id`, its `num_output_tokens`-th (from 1); None if it goes on."""
        if token_id in self.stop_token_ids:
            return StopReason.STOP
        if num_output_tokens >= self.max_tokens:
            return StopReason.LENGTH
        return None


class TokenHistory:
    """Which tokens a sequence has had, and how often in its answer: what penalties look at.

    One for each sequence whose sampling says `needs_history`, kept by its scheduler as long as the sequence
    lives (also while it is preempted), and passed with every chunk that draws a token. A draw looks at it
    as it is during the step; afterwards the scheduler appends the token that was drawn:

        history = TokenHistory(prompt_ids, answer_ids) if sampling.needs_history else None
        ScheduledChunk(..., sampling, num_output_tokens, history=history)
        history.append(result.token_id)

    answer_ids: the answer so far, where it began elsewhere: on the decode worker at least the first token; of
    a resumed request all tokens that were emitted. What counts as prompt is what the client sent, not what
    is computed again after a preemption.
    """

    def __init__(self, prompt_ids: Sequence[int], answer_ids: Sequence[int] = ()) -> None:
        self._token_ids = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        self._size = self._num_prompt = len(self._token_ids)
        self._counts = np.zeros(self._size, dtype=np.int64)
        self._places = dict(zip(self._token_ids.tolist(), range(self._size), strict=True))
        for token_id in answer_ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """The answer goes on with `token_id`."""
        place = self._places.setdefault(token_id, self._size)
        if place == self._size:
            if place == len(self._token_ids):
                more = np.zeros(max(16, place), dtype=np.int64)
                self._token_ids = np.concatenate((self._token_ids, more))
                self._counts = np.concatenate((self._counts, more))
            self._token_ids[place] = token_id
            self._size += 1
        self._counts[place] += 1

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """[num_distinct]: every token of prompt and answer once, the prompt's first. A view: read it now."""
        return self._token_ids[: self._size]

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """[num_distinct]: how often each of `token_ids` is in the answer. A view: read it now."""
        return self._counts[: self._size]

    @property
    def num_prompt(self) -> int:
        """So many of `token_ids`, the first ones, are in the prompt."""
        return self._num_prompt


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """A run of tokens of one sequence in one step: a prefill chunk, or the last token of a decoding sequence.

    token_ids: the tokens whose KV this step computes, at positions start .. start + len - 1.
    block_table: KV blocks of the sequence in order of position, covering at least start + len tokens.
    sampling: how to draw the token that follows, or None when none is wanted (not the prompt's last chunk).
    num_output_tokens: answer tokens drawn before this step.
    history: needed where a token is drawn and `sampling.needs_history`, else None.
    prompt_logprobs: the request's `sampling.prompt_logprobs`, on every chunk of its prompt, those that draw
    nothing included (None once the answer has begun). Only computed tokens have log-probabilities: no part
    of such a prompt may be left out because its KV is in the prefix cache.
    next_token: the prompt's token after this chunk, None if the chunk ends the prompt; read only if
    prompt_logprobs is set.
    Raises InvalidStepError for a draw with penalties and without history.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    sampling: TokenSampling | None
    num_output_tokens: int
    history: TokenHistory | None = None
    prompt_logprobs: int | None = None
    next_token: int | None = None

    def __post_init__(self) -> None:
        if self.sampling is not None and self.sampling.needs_history and self.history is None:
            raise InvalidStepError("a draw with penalties needs the sequence's history; it was not given")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, from the model's own distribution (before any sampling parameter).

    logprob, rank: of the token that is there; rank 1 is the most likely. top: (token id, log-probability) of
    the most likely ones, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What a step gives for one chunk.

    token_id: the token drawn, None where `chunk.sampling` was None. logprobs: of that token, where asked for.
    prompt_logprobs: where asked for, of the chunk's second token up to its `next_token`: those of all chunks
    of a prompt, one after the other, are those of the prompt's tokens from the second on.
    """

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
