"""When the gate is looked at.

A request that arrives is looked at at once: whether the next one finds the gate full depends on it. Whatever
may make room asks for a round; one is run in the next turn of the event loop, however many asked. A round
costs a decision for each request that is tried, so with many workers and a gate that is stuck rounds would
leave little time for the tokens of those who are being served. So after the last decision of a round, with
which nobody was placed, there is a pause of PAUSE_FACTOR times what it cost, and a round that goes on for
ROUND_S lets the others have a turn.

Room also comes by the passing of time alone, as a worker is expected to have got on with what it has; so
while somebody waits there is another round after RETRY_S, or later if the policy knows that it would be of no
use before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PAUSE_FACTOR = 4.0
ROUND_S = 0.002
RETRY_S = 0.01


class Pump:
    """Runs rounds in one event loop."""

    def __init__(
        self,
        place_next: Callable[[float], bool],
        on_placed_all: Callable[[float], float | None],
        clock: Callable[[], float],
    ) -> None:
        """place_next: places one request, and says whether there was one that could be placed.
        on_placed_all: called when there is no other; says in how many seconds it makes sense to look again,
        as somebody still waits, or None. Both are told `now`.
        """
        self._place_next = place_next
        self._on_placed_all = on_placed_all
        self._clock = clock
        self._handle: asyncio.TimerHandle | None = None
        self._due = 0.0  # when it fires
        self._not_before = 0.0

    def now(self) -> None:
        """A request has come; not to be called from within a round."""
        if asyncio.get_running_loop().time() < self._not_before:
            self.soon()
            return
        self.close()
        self._round()

    def soon(self) -> None:
        """Something has changed."""
        self._run_at(max(asyncio.get_running_loop().time(), self._not_before))

    def close(self) -> None:
        """No round is run, unless somebody asks."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _run_at(self, when: float) -> None:
        if self._handle is not None:
            if self._due <= when:
                return
            self._handle.cancel()
        self._due = when
        self._handle = asyncio.get_running_loop().call_at(when, self._round)

    def _round(self) -> None:
        self._handle = None
        began = now = self._clock()
        while self._place_next(now):
            now = self._clock()
            if now - began > ROUND_S:
                self.soon()
                return
        retry_s = self._on_placed_all(now)
        loop_time = asyncio.get_running_loop().time()
        self._not_before = loop_time + PAUSE_FACTOR * (self._clock() - now)
        if retry_s is not None:
            self._run_at(max(loop_time + max(RETRY_S, retry_s), self._not_before))
