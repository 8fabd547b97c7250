"""Virtual time: what is due next happens next, and the time is when it is due. A core."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count


class Clock:
    """now: seconds since the beginning. What is due at the same moment happens in the order in which it was
    asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._is_stopped = False

    def __call__(self) -> float:
        """The time, for whoever takes a clock."""
        return self.now

    def at(self, when: float, what: Callable[[], None]) -> None:
        """`what` happens at `when`, which must not be over."""
        heapq.heappush(self._due, (when, next(self._numbers), what))

    def stop(self) -> None:
        """Nothing more happens."""
        self._is_stopped = True

    def run(self, until: float = float("inf")) -> None:
        """Goes on until nothing is due, or only what is after `until`."""
        due, self._is_stopped = self._due, False
        while due and due[0][0] <= until and not self._is_stopped:
            self.now, _, what = heapq.heappop(due)
            what()
