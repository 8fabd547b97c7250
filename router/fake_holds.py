"""Places at which requests on a fake worker can be made to wait."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from enum import Enum


class Hold(Enum):
    """RESERVE: before Reserved. PREFILL: before the prompt is read. FIRST_TOKEN: before the token that
    follows is sent. TRANSFER: before the first token after a hand-off. DECODE: before each later one."""

    RESERVE = "reserve"
    PREFILL = "prefill"
    FIRST_TOKEN = "first_token"
    TRANSFER = "transfer"
    DECODE = "decode"


class Holds:
    """Which of these places are open (all, until `hold`), who waits there, and what else has changed."""

    def __init__(self) -> None:
        self._open = {hold: asyncio.Event() for hold in Hold}
        for place in self._open.values():
            place.set()
        self._waiting: Counter[Hold] = Counter()
        self._changed = asyncio.Condition()

    def hold(self, hold: Hold) -> None:
        """Requests that come to this place wait there."""
        self._open[hold].clear()

    def let_go(self, hold: Hold) -> None:
        """Requests pass this place again."""
        self._open[hold].set()

    def waiting(self, hold: Hold) -> int:
        """Requests that wait at this place."""
        return self._waiting[hold]

    async def pass_by(self, hold: Hold) -> None:
        """Returns when the place is open."""
        if self._open[hold].is_set():
            return
        self._waiting[hold] += 1
        try:
            await self.notify()
            await self._open[hold].wait()
        finally:
            self._waiting[hold] -= 1

    async def until(self, holds: Callable[[], bool]) -> None:
        """Returns when `holds()` is true after some change."""
        async with self._changed:
            await self._changed.wait_for(holds)

    async def notify(self) -> None:
        """Something has changed."""
        async with self._changed:
            self._changed.notify_all()
