"""Where a request's time went, so that the stages always add up to its duration.

    arrival --> placed --> first token --> end
            |          |               +-- transfer, decode_queue, decode
            |          +-- prefill_queue, prefill, first_token; or handoff_retry, and back to the gate
            +-- gate

The router's own clock gives the spans between these points; what workers report divides a span, and is
clipped to what fits in it. What is left of a span belongs to `first_token` (before the first token) or
`decode` (after it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router.requests import Stage


class StageClock:
    """Told when a request passes each point; all times in seconds on one clock."""

    def __init__(self, arrived_at: float) -> None:
        self._arrived_at = arrived_at
        self._mark = arrived_at  # end of what is already accounted for in _spent
        self._spent = dict.fromkeys(Stage, 0.0)
        self._placed = False
        self._first_token_at: float | None = None
        self._reports = dict.fromkeys(Stage, 0.0)

    def placed(self, now: float) -> None:
        """The request left the gate."""
        self._account(Stage.GATE, now)
        self._placed = True

    def reserved(self, now: float) -> None:
        """The decode worker has room: what follows is the prefill worker's, from its queue on."""
        self._account(Stage.PREFILL_QUEUE, now)

    def retried(self, now: float) -> None:
        """The placement came to nothing: back at the gate, and what was reported of it is void."""
        self._account(Stage.HANDOFF_RETRY, now)
        self._placed = False
        self._reports = dict.fromkeys(Stage, 0.0)

    def first_token(self, now: float) -> None:
        """The first token reached the router."""
        self._first_token_at = now

    def report(self, stage: Stage, seconds: float) -> None:
        """A worker measured `stage`; anything but a positive number counts as zero."""
        self._reports[stage] = seconds if seconds > 0 else 0.0

    def finish(self, now: float) -> Mapping[Stage, float]:
        """The seconds of every stage of a request that ends now; they add up to `now` - arrival."""
        if not self._placed:
            self._account(Stage.GATE, now)
            return dict(self._spent)
        until_first = now if self._first_token_at is None else self._first_token_at
        self._divide(until_first, (Stage.PREFILL_QUEUE, Stage.PREFILL), rest=Stage.FIRST_TOKEN)
        self._divide(now, (Stage.TRANSFER, Stage.DECODE_QUEUE), rest=Stage.DECODE)
        return dict(self._spent)

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
