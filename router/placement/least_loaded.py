"""The simplest placement that is not blind: the least loaded worker of each role that has room."""

from __future__ import annotations

from collections.abc import Collection

from router.placement.base import Decision, Kind
from router.pool_view import PoolView, Role, WorkerView
from router.requests import Request


class LeastLoadedPlacement:
    """Prefill: fewest outstanding prompt tokens. Decode: fewest requests. Ties go to the lower worker id.

    Room on a prefill worker: its outstanding tokens are less than two full batches, the running one plus one
    staged, so that it never runs dry and requests wait where their placement can still change. Room on a
    decode worker: free blocks for what it reserves and what the requests that it has may soon need
    (engine/reservation.py), and fewer requests than two full batches.
    """

    def __init__(self, pool: PoolView) -> None:
        self._pool = pool

    def choose(self, request: Request, avoid: Collection[str], now: float) -> Decision | None:
        pool = self._pool
        decodes = sorted(
            (worker for worker in pool.placeable(Role.DECODE) if _decode_has_room(worker, request)),
            key=lambda worker: (worker.worker_id in avoid, worker.requests, worker.worker_id),
        )
        prefills = sorted(
            (worker for worker in pool.placeable(Role.PREFILL) if _prefill_has_room(worker, request)),
            key=lambda worker: (worker.worker_id in avoid, worker.outstanding_tokens, worker.worker_id),
        )
        for prefill in prefills:
            if linked := pool.pairs.linked_with(prefill.worker_id):
                decode = next((one.worker_id for one in decodes if one.worker_id in linked), None)
                if decode is not None:
                    return Decision(Kind.DISAGGREGATED, prefill.worker_id, decode)
        return None


def _prefill_has_room(worker: WorkerView, request: Request) -> bool:
    needed = worker.capacity.blocks_for(request.num_tokens)
    staged = worker.outstanding_tokens < 2 * worker.capacity.max_batch_tokens
    return needed <= worker.capacity.num_blocks and staged and not worker.refused


def _decode_has_room(worker: WorkerView, request: Request) -> bool:
    if worker.capacity.blocks_for(request.max_total_tokens) > worker.capacity.num_blocks:
        return False  # could never end there
    reserved = worker.capacity.reserved_blocks(request.num_tokens, request.tokens_left)
    return worker.has_room_for(reserved) and worker.requests < 2 * worker.capacity.max_num_seqs
