"""What is sent, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

TIMEOUT_S = 120.0
"""After which a request is given up, if nothing else is said."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request to send `arrival_s` seconds after the start, whatever has become of those before it.

    output_tokens: that it asks for, and gets where the server can be told to ignore the end of an answer.
    """

    arrival_s: float
    prompt_token_ids: Sequence[int]
    output_tokens: int


class Status(StrEnum):
    """How a request ended, before anybody asks whether it was in time."""

    COMPLETE = "complete"
    """With a token at least, finish reason `stop` or `length`, and no error anywhere."""
    REJECTED = "rejected"
    """Refused for load: HTTP 429, gRPC RESOURCE_EXHAUSTED."""
    TIMED_OUT = "timed_out"
    """Given up by us."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Row:
    """One request, as its client saw it.

    arrival_s, sent_s: seconds since the start; sent_s is later by what the client itself was late.
    prompt_tokens, output_tokens: as the server counted them, or as they were asked for and came.
    first_s, last_s: of its tokens, seconds since sending; None if there were none.
    gaps_s: between the chunks that brought tokens. stages: seconds by the server's own account, if it gave
    one. error: what was the matter; empty if nothing was.
    """

    arrival_s: float
    sent_s: float
    prompt_tokens: int
    output_tokens: int
    status: Status
    first_s: float | None = None
    last_s: float | None = None
    gaps_s: Sequence[float] = ()
    stages: Mapping[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def ttft_s(self) -> float | None:
        """Seconds from sending to the first token."""
        return self.first_s

    @property
    def tpot_s(self) -> float | None:
        """(last token - first token) / (n - 1); 0 for n = 1, None without a token."""
        if self.first_s is None or self.last_s is None:
            return None
        return (self.last_s - self.first_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0
