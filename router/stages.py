"""Where a request's time went, so that the stages always add up to its duration.

    arrival --> placed --> first token ----------------> end
            |          |               |  +-- transfer, decode_queue, decode
            |          |               +-- lost --> next token: recovery, whatever happens in between
            |          +-- prefill_queue, prefill, first_token; or handoff_retry, and back to the gate
            +-- gate

The router's own clock gives the spans between these points; what workers report divides a span, and is
clipped to what fits in it. What is left of a span belongs to `first_token` (before the first token) or
`decode` (after it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum, auto

from router.requests import Stage

_NONE = dict.fromkeys(Stage, 0.0)


class _Span(Enum):
    """What the time since the last point goes to."""

    GATE = auto()
    PREFILL = auto()
    DECODE = auto()
    RECOVERY = auto()


class StageClock:
    """Told when a request passes each point; all times in seconds on one clock."""

    def __init__(self, arrived_at: float) -> None:
        self._mark = arrived_at  # end of what is already accounted for in _spent
        self._spent = _NONE.copy()
        self._span = _Span.GATE
        self._reports = _NONE.copy()

    def placed(self, now: float) -> None:
        """The request left the gate."""
        if self._span is _Span.GATE:
            self._account(Stage.GATE, now)
            self._span = _Span.PREFILL

    def reserved(self, now: float) -> None:
        """The decode worker has room: what follows is the prefill worker's, from its queue on."""
        if self._span is _Span.PREFILL:
            self._account(Stage.PREFILL_QUEUE, now)

    def lost(self, now: float) -> None:
        """The placement came to nothing: back at the gate, and what was reported of it is void."""
        match self._span:
            case _Span.PREFILL:
                self._account(Stage.HANDOFF_RETRY, now)
                self._span = _Span.GATE
            case _Span.DECODE:
                self._close(now)
                self._span = _Span.RECOVERY
        self._reports = _NONE.copy()

    def tokens(self, now: float) -> None:
        """The first token of the answer, or any later one, reached the client's stream."""
        if self._span is not _Span.DECODE:
            self._close(now)
            self._span = _Span.DECODE

    def report(self, stage: Stage, seconds: float) -> None:
        """A worker measured `stage`; anything but a positive number counts as zero."""
        self._reports[stage] = seconds if seconds > 0 else 0.0

    def finish(self, now: float) -> Mapping[Stage, float]:
        """The seconds of every stage of a request that ends now; they add up to `now` - arrival."""
        self._close(now)
        return dict(self._spent)

    def _close(self, now: float) -> None:
        match self._span:
            case _Span.GATE:
                self._account(Stage.GATE, now)
            case _Span.PREFILL:
                self._divide(now, (Stage.PREFILL_QUEUE, Stage.PREFILL), rest=Stage.FIRST_TOKEN)
            case _Span.DECODE:
                self._divide(now, (Stage.TRANSFER, Stage.DECODE_QUEUE), rest=Stage.DECODE)
            case _Span.RECOVERY:
                self._account(Stage.RECOVERY, now)

    def _account(self, stage: Stage, until: float) -> None:
        self._spent[stage] += until - self._mark
        self._mark = until

    def _divide(self, until: float, reported: Sequence[Stage], rest: Stage) -> None:
        left = until - self._mark
        for stage in reported:
            part = min(self._reports[stage], left)
            self._spent[stage] += part
            left -= part
        self._spent[rest] += left
        self._mark = until
