"""What a person is told meanwhile: what runs, how far all is, and how much longer it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[float, str], None]
Line = Callable[[str], None]


class Teller:
    """show: told the share that is done, and what runs. line: told what is worth a line of its own."""

    def __init__(self, show: Show, line: Line, clock: Callable[[], float] = time.monotonic) -> None:
        self._show = show
        self._clock = clock
        self._total = 0
        self._done = 0
        self._spent_s = 0.0
        self._timed = 0
        self._title = ""
        self.line = line

    def expect(self, parts: int) -> None:
        """So many more parts are to come."""
        self._total += parts

    @contextmanager
    def part(self, title: str) -> Iterator[Callable[[str], None]]:
        """Around each; yields what takes news of it. A part that does not ask for anything to be shown was
        there before, and says nothing about how long the others take."""
        begin, shown = self._clock(), False

        def tell(said: str) -> None:
            nonlocal shown
            shown = True
            self._tell(title, said)

        yield tell
        self._done += 1
        if shown:
            self._timed += 1
            self._spent_s += self._clock() - begin

    def _tell(self, title: str, said: str) -> None:
        share = self._done / self._total if self._total else 0.0
        left = ""
        if self._timed:
            left = f" [{_duration((self._total - self._done) * self._spent_s / self._timed)} left]"
        self._show(share, f"{title}: {said}{left}")


def _duration(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.0f} h"
