"""A run of decode steps of the same sequences: when each ends, and what of it has been taken into account."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from cluster.simulator.live import Live
from engine.sequence import RequestKey


class Run:
    """Steps one after the other from `began` on. writes: the requests whose answers they write, each with its
    placement.

    Two look at it: the worker, which does what steps do (`take`), and later the router, which hears of each
    when its message has come (`hear`).
    """

    def __init__(
        self, began: float, steps_s: Sequence[float], writes: Sequence[tuple[Live, RequestKey]]
    ) -> None:
        self.writes = writes
        self._times = [*accumulate(steps_s, initial=began)]
        self._num_taken = 0
        self._num_heard = 0

    @property
    def num_steps(self) -> int:
        return len(self._times) - 1

    @property
    def end(self) -> float:
        return self._times[-1]

    def num_over(self, now: float) -> int:
        """Steps that have ended, the last one not among them."""
        return min(self.num_steps, bisect_right(self._times, now)) - 1

    def cut(self, now: float) -> bool:
        """Nothing is begun any more: it ends with the step that is under way. Returns whether it would not
        have otherwise."""
        last = max(1, bisect_left(self._times, now))
        if last >= self.num_steps:
            return False
        del self._times[last + 1 :]
        return True

    def take(self, num_steps: int) -> list[tuple[float, float]]:
        """Those of the first num_steps that were not taken before: when each began and ended."""
        begins = self._times[self._num_taken : num_steps]
        ends = self._times[self._num_taken + 1 : num_steps + 1]
        self._num_taken = max(self._num_taken, num_steps)
        return list(zip(begins, ends, strict=True))

    def hear(self, until: float, message_s: float) -> int:
        """How many have been heard of by then that were not before."""
        heard = self._num_heard
        while heard < self.num_steps and self._times[heard + 1] + message_s <= until:
            heard += 1
        new, self._num_heard = heard - self._num_heard, heard
        return new
