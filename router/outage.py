"""How long requests wait at the gate while there is no pair of workers for any of them.

A worker that was lost may come back, and a link may be made again, so what lives waits for a while; past it,
everything at the gate ends, and new requests are refused at once until there is a pair.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from router.admission.shortage import shortage_of
from router.errors import RouterError
from router.pool_view import PoolView


class Outage:
    """Watches the pool for a shortage; lives in one event loop."""

    def __init__(self, pool: PoolView, wait_s: float, on_over: Callable[[RouterError], None]) -> None:
        """on_over: called when a shortage has lasted for `wait_s`."""
        self._pool = pool
        self._wait_s = wait_s
        self._on_over = on_over
        self._reason: str | None = None  # of the shortage that there is
        self._timer: asyncio.TimerHandle | None = None
        self.overdue = False
        """Whether the shortage has lasted for too long."""

    def look(self) -> None:
        """The pool has changed, or a request came to the gate that had been placed."""
        shortage = shortage_of(self._pool)
        reason = None if shortage is None else shortage.reason
        if reason != self._reason:
            self._reason, self.overdue = reason, False
            self.close()
        if reason is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._wait_s, self._end)

    def close(self) -> None:
        """Stops watching."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        self._timer, self.overdue = None, True
        shortage = shortage_of(self._pool)
        if shortage is not None:
            self._on_over(shortage.error)
