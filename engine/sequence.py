"""The values that a step is made of: sampling parameters, scheduled chunks, stop reasons. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class RequestKey:
    """One placement of one request: a retry has a new attempt, and what names an old attempt is ignored."""

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

    def stop_reason(self, token_id: int, num_output_tokens: int) -> StopReason | None:
        """Why the answer ends with `token_id`, its `num_output_tokens`-th (from 1); None if it goes on."""
        if token_id in self.stop_token_ids:
            return StopReason.STOP
        if num_output_tokens >= self.max_tokens:
            return StopReason.LENGTH
        return None


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """A run of tokens of one sequence in one step: a prefill chunk, or the last token of a decoding sequence.

    token_ids: the tokens whose KV this step computes, at positions start .. start + len - 1.
    block_table: KV blocks of the sequence in order of position, covering at least start + len tokens.
    sampling: how to draw the token that follows, or None when none is wanted (not the prompt's last chunk).
    num_output_tokens: answer tokens drawn before this step.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    sampling: TokenSampling | None
    num_output_tokens: int


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
    prompt_logprobs: of this chunk's tokens, where asked for; the prompt's first token has none.
    """

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
