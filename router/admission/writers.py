"""The workers that write answers, as admission sees them: whether one will have room for another one."""

from __future__ import annotations

import math
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

    def tpot_s(self, request: Request, in_s: float, now: float) -> float:
        """The time per token that one has for the request, if that joins it `in_s` from now: of the first
        that would be in time, else the least; 0 where none is up. What it does to those who are there is for
        the placement to judge."""
        least_s = math.inf
        for worker in self._some():
            least_s = min(least_s, self._estimates.decode(worker, request, in_s, now).step_s)
            if least_s <= request.slo.limits.tpot_s:
                break
        return least_s if least_s < math.inf else 0.0

    def have_room(self, request: Request, now: float) -> bool:
        """Whether one of them would take the request now, and be in time."""
        return any(
            may_write(one, request)
            and self._estimates.decode(one, request, 0.0, now).step_s <= request.slo.limits.tpot_s
            and not self._estimates.outgrows(one, request)
            for one in self._some()
        )

    def _some(self) -> Iterator[WorkerView]:
        workers = self._pool.placeable(*WRITERS)
        looks = min(_LOOKS, len(workers))
        self._turn += looks
        for look in range(looks):
            yield workers[(self._turn + look) % len(workers)]
