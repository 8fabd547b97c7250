"""First come, first served."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from router.requests import Request


class FcfsGateQueue:
    """First come, first served, by arrival at the router: what comes back stands where it stood."""

    def __init__(self) -> None:
        self._waiting: dict[str, Request] = {}
        # Entries whose request has left are dropped when they reach the top.
        self._order: list[tuple[float, str]] = []

    def add(self, request: Request) -> None:
        self._waiting[request.request_id] = request
        heapq.heappush(self._order, (request.arrived_at, request.request_id))

    def remove(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)
        if len(self._order) > 2 * len(self._waiting) + 64:  # a stuck head must not let the others pile up
            self._order = [(request.arrived_at, request.request_id) for request in self._waiting.values()]
            heapq.heapify(self._order)

    def placed(self, request_id: str) -> None:
        self.remove(request_id)

    def next(self, now: float) -> Iterable[Request]:
        while self._order and self._order[0][1] not in self._waiting:
            heapq.heappop(self._order)
        return (self._waiting[self._order[0][1]],) if self._order else ()

    def __len__(self) -> int:
        return len(self._waiting)
