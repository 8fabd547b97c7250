"""What a request is inside the router, whichever front end it came through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain
from typing import NamedTuple

from engine.sequence import TokenLogprobs, TokenSampling
from router.slo import Slo, SloLimits
from router.text_alignment import ScoredToken


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt that wants one answer, validated and tokenised, every default resolved.

    request_id: unique among all requests of all time (it begins with what the client chose, if it chose one).
    stop: stop strings; they end the answer and are not part of its text.
    arrived_at, deadline: on the router's clock, seconds. The deadline is hard: past it the request ends with
    an error.
    answered: tokens of the answer that are out already, from placements that were lost. sampling.max_tokens
    and min_tokens count them.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: TokenSampling
    stop: tuple[str, ...]
    slo: Slo
    tenant: str
    arrived_at: float
    deadline: float
    answered: tuple[int, ...] = ()

    def going_on(self, answered: Sequence[int]) -> Request:
        """This request, to be placed again after its client got so much of the answer."""
        sampling = self.sampling
        if answered:  # what was said of the prompt came with the first token
            sampling = replace(sampling, prompt_logprobs=None)
        return replace(self, sampling=sampling, answered=tuple(answered))

    @property
    def num_tokens(self) -> int:
        """Tokens that a prefill worker has to read: the prompt, and what there is of the answer."""
        return len(self.prompt_token_ids) + len(self.answered)

    @property
    def tokens_left(self) -> int:
        """Tokens that may still come."""
        return self.sampling.max_tokens - len(self.answered)

    @property
    def max_total_tokens(self) -> int:
        """Positions that prompt and longest possible answer take."""
        return len(self.prompt_token_ids) + self.sampling.max_tokens


class Outcome(StrEnum):
    """How a request ended, as counted in `prelay_requests_total`."""

    GOOD = "good"
    TTFT_MISS = "ttft_miss"
    TPOT_MISS = "tpot_miss"
    BOTH_MISS = "both_miss"
    REJECTED = "rejected"
    ERROR = "error"
    CANCELLED = "cancelled"

    @property
    def is_complete(self) -> bool:
        """Whether the client got its whole answer."""
        return self in (Outcome.GOOD, Outcome.TTFT_MISS, Outcome.TPOT_MISS, Outcome.BOTH_MISS)


class Stage(StrEnum):
    """Where a request's time went; the stages of a request add up to its duration."""

    GATE = "gate"
    PREFILL_QUEUE = "prefill_queue"
    PREFILL = "prefill"
    FIRST_TOKEN = "first_token"
    TRANSFER = "transfer"
    DECODE_QUEUE = "decode_queue"
    DECODE = "decode"
    HANDOFF_RETRY = "handoff_retry"
    RECOVERY = "recovery"


@dataclass(frozen=True, slots=True)
class Details:
    """How a request was served. Times in seconds; ttft_s is None when no token came.

    slo_class, limits: what it was judged by. placement: how it was placed last (`placement.base.Kind`); empty
    if it never was.
    """

    request_id: str
    prefill_worker: str
    decode_worker: str
    attempt: int
    kv_bytes: int
    ttft_s: float | None
    tpot_s: float
    duration_s: float
    stages: Mapping[Stage, float]
    outcome: Outcome
    slo_class: str
    limits: SloLimits
    placement: str


class FinishReason(StrEnum):
    """Why an answer is complete (OpenAI's words)."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a complete answer. cached_tokens: tokens of the prompt whose KV was there already."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    details: Details
    cached_tokens: int = 0


class Delta(NamedTuple):
    """What was added to an answer. Text may lag behind tokens (half a character, a possible stop string). One
    is made for nearly every token, so it is what costs least.

    logprobs: of token_ids, if asked for. scored: the same of the tokens whose text is out with this delta;
    what is not part of the text (the token that stops the answer, a stop string) is not among them.
    prompt_logprobs: with the first delta, if asked for: of the prompt's tokens from the second on.
    """

    token_ids: tuple[int, ...]
    text: str
    finish: Finish | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    scored: tuple[ScoredToken, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @classmethod
    def joined(cls, deltas: Sequence[Delta]) -> Delta:
        """Consecutive deltas as one."""
        return cls(
            tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
            "".join(delta.text for delta in deltas),
            deltas[-1].finish,
            tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
            tuple(chain.from_iterable(delta.scored for delta in deltas)),
            tuple(chain.from_iterable(delta.prompt_logprobs for delta in deltas)),
        )
