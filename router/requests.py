"""What a request is inside the router, whichever front end it came through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from engine.sequence import TokenSampling
from router.slo import Slo


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt that wants one answer, validated and tokenised, every default resolved.

    request_id: unique among all requests of all time (it begins with what the client chose, if it chose one).
    stop: stop strings; they end the answer and are not part of its text.
    arrived_at, deadline: on the router's clock, seconds. The deadline is hard: past it the request ends with
    an error.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: TokenSampling
    stop: tuple[str, ...]
    slo: Slo
    tenant: str
    arrived_at: float
    deadline: float

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


@dataclass(frozen=True, slots=True)
class Details:
    """How a request was served. Times in seconds; ttft_s is None when no token came."""

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


class FinishReason(StrEnum):
    """Why an answer is complete (OpenAI's words)."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a complete answer."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    details: Details


@dataclass(frozen=True, slots=True)
class Delta:
    """What was added to an answer. Text may lag behind tokens (half a character, a possible stop string)."""

    token_ids: tuple[int, ...]
    text: str
    finish: Finish | None

    def then(self, later: Delta) -> Delta:
        """This delta and the one after it as one."""
        return Delta(self.token_ids + later.token_ids, self.text + later.text, later.finish)
