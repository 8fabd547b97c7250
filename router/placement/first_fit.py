"""The first workers with room, in the order in which a policy wants them: what most baselines do.

Pairs are tried prefill worker by prefill worker, each with the writers that it is linked to. A mixed worker
reads a prompt itself only where no pair could ever hold the request. Workers that have failed the request
before come last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from router.placement.base import Decision, Kind
from router.placement.room import can_read, has_slot, may_write, no_pair_ever
from router.pool_view import PoolView, Role, WorkerView
from router.requests import Request

Rank = Callable[[WorkerView], Any]
"""What to sort by: the lower is tried first, of equals the lower worker id."""


def first_fit(
    pool: PoolView,
    request: Request,
    avoid: Collection[str],
    prefill: Rank,
    writer: Rank,
    local: Rank,
    slot: Callable[[WorkerView], bool] = has_slot,
) -> Decision | None:
    """The first linked pair with room; of workers that have no pair, the first mixed one with room.

    slot: whether a worker takes another prompt.
    """
    readers = [one for one in pool.placeable(Role.PREFILL) if slot(one) and can_read(one, request)]
    writers = in_order(writers_with_room(pool, request), writer, avoid) if readers else []
    decision = first_pair(pool, in_order(readers, prefill, avoid), writers)
    if decision is None and no_pair_ever(pool, request):
        return first_local(pool, request, avoid, local, slot)
    return decision


def first_pair(
    pool: PoolView, prefills: Iterable[WorkerView], writers: Sequence[WorkerView]
) -> Decision | None:
    """The first prefill worker that is linked to a writer, and the first of these."""
    if not writers:
        return None
    for prefill in prefills:
        linked = pool.pairs.linked_with(prefill.worker_id)
        writer = next((one for one in writers if one.worker_id in linked), None)
        if writer is not None:
            return Decision(Kind.DISAGGREGATED, prefill.worker_id, writer.worker_id)
    return None


def first_local(
    pool: PoolView,
    request: Request,
    avoid: Collection[str],
    rank: Rank,
    slot: Callable[[WorkerView], bool] = has_slot,
) -> Decision | None:
    """The first mixed worker with room for a prompt and its answer."""
    for worker in in_order(pool.placeable(Role.MIXED), rank, avoid):
        if slot(worker) and may_write(worker, request):
            return Decision(Kind.LOCAL, None, worker.worker_id)
    return None


def writers_with_room(pool: PoolView, request: Request) -> list[WorkerView]:
    """The decode and mixed workers that take the request from a prefill worker now."""
    writers = (*pool.placeable(Role.DECODE), *pool.placeable(Role.MIXED))
    return [worker for worker in writers if may_write(worker, request)]


def in_order(workers: Iterable[WorkerView], rank: Rank, avoid: Collection[str]) -> list[WorkerView]:
    """By rank, those to avoid last."""
    return sorted(workers, key=lambda one: (one.worker_id in avoid, rank(one), one.worker_id))
