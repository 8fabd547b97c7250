"""No hand-offs: whoever reads a prompt writes its answer, as replicas that chunk prompts beside decoding do.

The baseline of colocated serving (Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with
Sarathi-Serve", OSDI 2024) over several replicas, behind a balancer that joins the shortest queue. For mixed
workers; what none of them could ever hold, or all that comes where there are none, is disaggregated.
"""

from __future__ import annotations

from collections.abc import Collection

from router.placement.base import Decision
from router.placement.first_fit import first_fit, first_local
from router.placement.least_loaded import num_requests, unread_tokens
from router.placement.room import can_write
from router.pool_view import PoolView, Role, WorkerView
from router.requests import Request


class ColocatedPlacement:
    """Fewest prompt tokens that wait, then fewest requests."""

    def __init__(self, pool: PoolView) -> None:
        self._pool = pool

    def choose(self, request: Request, avoid: Collection[str], now: float) -> Decision | None:
        if any(can_write(worker, request) for worker in self._pool.placeable(Role.MIXED)):
            return first_local(self._pool, request, avoid, _outstanding)
        return first_fit(self._pool, request, avoid, unread_tokens, num_requests, unread_tokens)


def _outstanding(worker: WorkerView) -> tuple[int, int]:
    return worker.outstanding_tokens, worker.requests
