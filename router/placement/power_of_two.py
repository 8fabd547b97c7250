"""Of two decode workers drawn at random, the one with the lower predicted load.

TetriInfer's dispatch (Hu et al., "Inference without Interference: Disaggregate LLM Inference for Mixed
Downstream Workloads", 2024, arXiv:2401.11181): the prompt goes to the least loaded prefill instance, and its
answer, of predicted length, to the better of two random decode instances that have room (Mitzenmacher's power
of two choices), so that many dispatchers with stale figures do not all choose the same. TetriInfer predicts
by a classifier over prompts; here by how long answers have been.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from router.estimates import Estimates
from router.placement.base import Decision, Kind
from router.placement.first_fit import in_order, writers_with_room
from router.placement.least_loaded import unread_tokens
from router.placement.room import can_read, has_slot, no_pair_ever
from router.pool_view import PoolView, Role, WorkerView
from router.requests import Request


class PowerOfTwoPlacement:
    """Prefill: fewest outstanding prompt tokens. Decode: fewer tokens of context, when the request comes."""

    def __init__(self, pool: PoolView, estimates: Estimates, rng: random.Random) -> None:
        self._pool = pool
        self._estimates = estimates
        self._rng = rng

    def choose(self, request: Request, avoid: Collection[str], now: float) -> Decision | None:
        pool = self._pool
        writers = writers_with_room(pool, request)
        readers = [one for one in pool.placeable(Role.PREFILL) if has_slot(one) and can_read(one, request)]
        for reader in in_order(readers, unread_tokens, avoid) if writers else ():
            linked = pool.pairs.linked_with(reader.worker_id)
            if of_these := [one for one in writers if one.worker_id in linked]:
                in_s = self._estimates.prefill(reader, request, now, told=False).ttft_s
                decode = self._better_of_two(of_these, avoid, request, in_s, now)
                return Decision(Kind.DISAGGREGATED, reader.worker_id, decode.worker_id)
        if no_pair_ever(pool, request):
            mixed = [one for one in writers if one.role is Role.MIXED and has_slot(one)]
            if mixed:
                one = self._better_of_two(mixed, avoid, request, 0.0, now)
                return Decision(Kind.LOCAL, None, one.worker_id)
        return None

    def _better_of_two(
        self, workers: Sequence[WorkerView], avoid: Collection[str], request: Request, in_s: float, now: float
    ) -> WorkerView:
        good = [worker for worker in workers if worker.worker_id not in avoid] or workers
        two = self._rng.sample(good, min(2, len(good)))

        def load(worker: WorkerView) -> tuple[int, int]:
            predicted = self._estimates.decode(worker, request, in_s, now)
            return worker.outstanding_tokens + predicted.context, predicted.batch

        return min(two, key=load)
