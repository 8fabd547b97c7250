"""Whether a worker could ever hold a request, and whether it has room for it now. Pure functions.

Could it ever: its KV blocks hold the prompt (who reads), prompt and longest possible answer (who writes).

Room to read: the prompt tokens that are not computed yet are less than two full batches, the running one plus
one staged, so that the worker never runs dry and requests wait where their placement can still change.

Room to write: free blocks for what the request reserves and for what those that are there may soon need
(engine/reservation.py), and fewer requests than two full batches.
"""

from __future__ import annotations

from router.pool_view import PoolView, Role, WorkerView
from router.requests import Request


def can_read(worker: WorkerView, request: Request) -> bool:
    """Whether the worker could ever hold the prompt and what there is of the answer."""
    return request.num_tokens <= worker.capacity.num_tokens


def can_write(worker: WorkerView, request: Request) -> bool:
    """Whether the answer could ever end there."""
    return request.max_total_tokens <= worker.capacity.num_tokens


def has_slot(worker: WorkerView) -> bool:
    """Whether the running batch of prompts plus one staged are not full."""
    return worker.outstanding_tokens < 2 * worker.capacity.max_batch_tokens and not worker.refused


def has_blocks(worker: WorkerView, request: Request) -> bool:
    """Whether a worker that could ever hold the answer accepts the request now."""
    reserved = worker.capacity.reserved_blocks(request.num_tokens, request.tokens_left)
    return worker.requests < 2 * worker.capacity.max_num_seqs and worker.has_room_for(reserved)


def may_write(worker: WorkerView, request: Request) -> bool:
    """Whether a decode or mixed worker takes the request now, from a prefill worker."""
    return can_write(worker, request) and has_blocks(worker, request)


def no_pair_ever(pool: PoolView, request: Request) -> bool:
    """Whether no two linked workers to which requests go now could ever hold it: it can only be read by the
    worker that writes its answer."""
    for prefill in pool.placeable(Role.PREFILL):
        if can_read(prefill, request):
            for decode in pool.pairs.linked_with(prefill.worker_id):
                worker = pool.get(decode)
                if worker is not None and worker.takes_new and can_write(worker, request):
                    return False
    return True
