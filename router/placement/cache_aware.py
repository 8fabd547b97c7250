"""The prefill worker that promises the first token soonest, its cached prefix taken into account.

Mooncake's Algorithm 1 (Qin et al., "Mooncake: A KVCache-centric Disaggregated Architecture for LLM Serving",
2024, arXiv:2407.00079): for every prefill instance, TTFT = time in its queue + time to compute what of the
prompt it has not cached; the least wins, and the decode instance is the one with the least load when the
request gets there. A request binds at once and queues at its workers. Prefixes are not copied between
prefill workers here, so that branch of the algorithm is left out. Its early rejection is
router/admission/mooncake.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from router.estimates import DecodeEstimate, Estimates
from router.placement.base import Decision, Expected, Kind
from router.placement.first_fit import in_order, writers_with_room
from router.placement.room import can_read, no_pair_ever
from router.pool_view import PoolView, Role, WorkerView
from router.requests import Request


class CacheAwarePlacement:
    """Prefill: least TTFT. Decode: least time per token when the request is handed over."""

    def __init__(self, pool: PoolView, estimates: Estimates) -> None:
        self._pool = pool
        self._estimates = estimates

    def choose(self, request: Request, avoid: Collection[str], now: float) -> Decision | None:
        pool, estimates = self._pool, self._estimates
        writers = writers_with_room(pool, request)
        readers = [
            (estimates.prefill(worker, request, now, told=False).ttft_s, worker.outstanding_tokens, worker)
            for worker in pool.placeable(Role.PREFILL)
            if writers and can_read(worker, request) and not worker.refused
        ]
        readers.sort(key=lambda one: (one[2].worker_id in avoid, one[0], one[1], one[2].worker_id))
        for ttft_s, _, reader in readers:
            linked = pool.pairs.linked_with(reader.worker_id)
            if of_these := [one for one in writers if one.worker_id in linked]:
                writer, decode = self._least_step(of_these, avoid, request, ttft_s, now)
                transfer_s = estimates.transfer_s(reader, writer, request.num_tokens)
                expected = Expected(ttft_s, decode.step_s, transfer_s)
                return Decision(Kind.DISAGGREGATED, reader.worker_id, writer.worker_id, expected)
        if no_pair_ever(pool, request):
            return self._local((one for one in writers if one.role is Role.MIXED), avoid, request, now)
        return None

    def _least_step(
        self, workers: Iterable[WorkerView], avoid: Collection[str], request: Request, in_s: float, now: float
    ) -> tuple[WorkerView, DecodeEstimate]:
        loads = {one.worker_id: self._estimates.decode(one, request, in_s, now) for one in workers}
        best = min(loads, key=lambda one: (one in avoid, loads[one].step_s, loads[one].context, one))
        return self._pool[best], loads[best]

    def _local(
        self, workers: Iterable[WorkerView], avoid: Collection[str], request: Request, now: float
    ) -> Decision | None:
        ttfts = {
            one.worker_id: self._estimates.local(one, request, now, told=False).ttft_s for one in workers
        }
        mixed = in_order(
            (self._pool[one] for one in ttfts),
            lambda one: (ttfts[one.worker_id], one.outstanding_tokens, one.requests),
            avoid,
        )
        if not mixed:
            return None
        best, ttft_s = mixed[0], ttfts[mixed[0].worker_id]
        tpot_s = self._estimates.decode(best, request, ttft_s, now).step_s
        return Decision(Kind.LOCAL, None, best.worker_id, Expected(ttft_s, tpot_s, 0.0))
