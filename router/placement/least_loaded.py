"""The simplest placement that is not blind: the least loaded worker of each role that has room.

Join-shortest-queue for prefill, least loaded for decode, as DistServe places behind its FCFS queue (Zhong et
al., "DistServe: Disaggregating Prefill and Decoding for Goodput-optimized Large Language Model Serving",
OSDI 2024, section 4.3).
"""

from __future__ import annotations

from collections.abc import Collection

from router.placement.base import Decision
from router.placement.first_fit import first_fit
from router.pool_view import PoolView, WorkerView
from router.requests import Request


class LeastLoadedPlacement:
    """Prefill: fewest outstanding prompt tokens. Decode: fewest requests."""

    def __init__(self, pool: PoolView) -> None:
        self._pool = pool

    def choose(self, request: Request, avoid: Collection[str], now: float) -> Decision | None:
        return first_fit(self._pool, request, avoid, unread_tokens, num_requests, unread_tokens)


def unread_tokens(worker: WorkerView) -> float:
    """Prompt tokens that wait to be computed there."""
    return worker.outstanding_tokens


def num_requests(worker: WorkerView) -> float:
    """Requests there, in whatever state."""
    return worker.requests
