"""The workers of each role in turn: blind to load, as a load balancer in front of workers is by default."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from router.placement.base import Decision
from router.placement.first_fit import Rank, first_fit
from router.pool_view import PoolView, Role, WorkerView
from router.requests import Request


class RoundRobinPlacement:
    """By worker id, whoever comes after the one that was last; a worker without room is passed over."""

    def __init__(self, pool: PoolView) -> None:
        self._pool = pool
        self._last_reader = self._last_writer = ""

    def choose(self, request: Request, avoid: Collection[str], now: float) -> Decision | None:
        mixed = self._pool.placeable(Role.MIXED)
        reader = _turn(self._pool.placeable(Role.PREFILL), self._last_reader)
        writer = _turn([*self._pool.placeable(Role.DECODE), *mixed], self._last_writer)
        decision = first_fit(self._pool, request, avoid, reader, writer, writer)
        if decision is not None:
            self._last_writer = decision.decode
            if decision.prefill is not None:
                self._last_reader = decision.prefill
        return decision


def _turn(workers: Sequence[WorkerView], last: str) -> Rank:
    """Ranks those who come after `last` before the others."""
    later = {worker.worker_id for worker in workers if worker.worker_id > last}
    return lambda worker: worker.worker_id not in later
