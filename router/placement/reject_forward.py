"""An idle prefill worker accepts, a busy one refuses, and the next one is tried: no estimate of any queue.

P/D-Serve's on-demand forwarding (Jin et al., "P/D-Serve: Serving Disaggregated Large Language Model at
Scale", 2024, arXiv:2408.08147): the gateway forwards a prompt to the prefill instance with the fewest open
streams; if that one is busy it refuses, and the gateway tries the next, until one accepts. Here the router's
own ledger says who would refuse, so nothing has to be sent to find out, and a request that all refuse is
tried again by the gate.
"""

from __future__ import annotations

from collections.abc import Collection

from router.placement.base import Decision
from router.placement.first_fit import first_fit
from router.placement.least_loaded import num_requests
from router.pool_view import PoolView, WorkerView
from router.requests import Request


class RejectForwardPlacement:
    """Prefill and decode: fewest requests, of the prefill workers that are idle."""

    def __init__(self, pool: PoolView) -> None:
        self._pool = pool

    def choose(self, request: Request, avoid: Collection[str], now: float) -> Decision | None:
        return first_fit(self._pool, request, avoid, num_requests, num_requests, num_requests, slot=_is_idle)


def _is_idle(worker: WorkerView) -> bool:
    return worker.outstanding_tokens == 0 and not worker.refused
