"""The workers that read prompts, as the gate sees them: how many there are, and how soon one is free."""

from __future__ import annotations

from collections.abc import Iterator

from router.estimates import Estimates, LocalEstimate, PrefillEstimate
from router.pool_view import READERS, PoolView, Role, WorkerView
from router.prefix_index import PrefixIndex
from router.requests import Request

_LOOKS = 8
_LEAST_TOKEN_S = 1e-9


class Readers:
    """Prefill and mixed workers that new requests go to. Where there are many, each question looks at those
    that hold most of the prompt and a few others of either role, the next one at the next few: the least of
    some is near the least of all of them, and costs the same in any pool."""

    def __init__(self, pool: PoolView, estimates: Estimates, prefixes: PrefixIndex) -> None:
        self._pool = pool
        self._estimates = estimates
        self._prefixes = prefixes
        self._turns = dict.fromkeys(READERS, 0)

    def __len__(self) -> int:
        return len(self._pool.placeable(*READERS))

    @property
    def only_read(self) -> bool:
        """None of them writes as well."""
        return not self._pool.placeable(Role.MIXED)

    def read_s(self, request: Request) -> float:
        """What the request takes a reader that has nothing else to do, the one that holds most of it. While
        that is not known, next to nothing, though more for a longer prompt."""
        least_s = self._estimates.read_s(request)
        for worker in self._holders(request):
            least_s = min(least_s, self._estimate(worker, request, request.arrived_at).compute_s)
        return max(least_s, request.num_tokens * _LEAST_TOKEN_S)

    def wait_s(self, request: Request, now: float) -> float:
        """The least time until a reader begins with the request; 0 where none is up."""
        return min((one.wait_s for one in self._some(request, now)), default=0.0)

    def ttft_s(self, request: Request, now: float) -> float:
        """The least time to first token that a reader has for the request, as things are there; 0 where none
        is up."""
        return min((one.ttft_s for one in self._some(request, now)), default=0.0)

    def _some(self, request: Request, now: float) -> Iterator[PrefillEstimate | LocalEstimate]:
        for role in READERS:
            workers = self._pool.placeable(role)
            looks = min(_LOOKS, len(workers))
            self._turns[role] += looks
            for look in range(looks):
                yield self._estimate(workers[(self._turns[role] + look) % len(workers)], request, now)
        if any(len(self._pool.placeable(role)) > _LOOKS for role in READERS):
            for worker in self._holders(request):
                yield self._estimate(worker, request, now)

    def _holders(self, request: Request) -> Iterator[WorkerView]:
        for worker_id in self._prefixes.holders(request):
            worker = self._pool.get(worker_id)
            if worker is not None and worker.takes_new and worker.role.reads:
                yield worker

    def _estimate(self, worker: WorkerView, request: Request, now: float) -> PrefillEstimate | LocalEstimate:
        if worker.role is Role.MIXED:
            return self._estimates.local(worker, request, now)
        return self._estimates.prefill(worker, request, now)
