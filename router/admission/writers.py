"""The workers that write answers, as admission sees them: whether one will have room for another one."""

from __future__ import annotations

from collections.abc import Iterator

from router.estimates import Estimates
from router.placement.room import may_write
from router.pool_view import WRITERS, PoolView, WorkerView
from router.requests import Request

_LOOKS = 8


class Writers:
    """Decode and mixed workers that new requests go to. Where there are many, each question looks at a few,
    the next one at the next few."""

    def __init__(self, pool: PoolView, estimates: Estimates) -> None:
        self._pool = pool
        self._estimates = estimates
        self._turn = 0

    def overrun(self, request: Request, in_s: float, now: float) -> float:
        """By how much the steps of the least loaded writer would be longer than they may be for all whose
        answers it writes, if the request joined them `in_s` from now: 1 is not at all; 0 where none is up."""
        estimates = (self._estimates.decode(one, request, in_s, now) for one in self._some())
        return min((one.step_s / one.limit_s for one in estimates), default=0.0)

    def have_room(self, request: Request, now: float) -> bool:
        """Whether one of them would take the request now, and keep everybody's limits."""
        for one in self._some():
            estimate = self._estimates.decode(one, request, 0.0, now)
            if may_write(one, request) and estimate.step_s <= estimate.limit_s:
                return True
        return False

    def _some(self) -> Iterator[WorkerView]:
        workers = self._pool.placeable(*WRITERS)
        looks = min(_LOOKS, len(workers))
        self._turn += looks
        for look in range(looks):
            yield workers[(self._turn + look) % len(workers)]
