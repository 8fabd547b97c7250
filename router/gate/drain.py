"""How fast a pool takes on what waits for it."""

from __future__ import annotations

import math

_MEMORY_S = 10.0
_PRIOR_S = 1.0
"""What readers are taken to have done as predicted: each one of them, as the first of many to be full would
otherwise stand for all."""
_LEAST, _MOST = 0.1, 10.0
_SLOWEST, _FASTEST = 0.6, 1.7


class DrainRate:
    """Work placed per second and reader while something waited: 1 where readers do nothing else, predictions
    are right, and nothing else is short. Less where readers also write, where blocks are short, or where
    reading takes longer than predicted: since what waits is predicted alike, such errors cancel out."""

    def __init__(self) -> None:
        self._reader_s = self._work_s = 0.0
        self._readers = 1
        self._looked_at = 0.0
        self._busy = False

    @property
    def pace(self) -> float:
        """How much faster than predicted a reader is with one prompt. No more than predictions may be wrong:
        what is beyond has other reasons, and the further beyond, the less does it say of readers."""
        share = self.share
        if share >= _SLOWEST:
            return min(_FASTEST, share)
        return min(1.0, _SLOWEST + 2 * (_SLOWEST - share))

    @property
    def share(self) -> float:
        """Work per second and reader."""
        prior_s = _PRIOR_S * self._readers
        return min(_MOST, max(_LEAST, (prior_s + self._work_s) / (prior_s + self._reader_s)))

    def look(self, now: float, readers: int, *, blocked: bool, waiting: bool) -> None:
        """Called before something is placed. blocked: all that was to be placed the last time is still
        there, so readers have been full since. waiting: something waits."""
        self._readers = max(1, readers)
        if blocked:
            self._busy = True
            seconds = now - self._looked_at
            if seconds > 0:
                keep = math.exp(-seconds / _MEMORY_S)
                self._work_s *= keep
                self._reader_s = self._reader_s * keep + seconds * readers
        elif not waiting:
            self._busy = False
        self._looked_at = now

    def placed(self, work_s: float) -> None:
        """Work was placed; it counts where it took the place of work that was done, not one that was free."""
        if self._busy:
            self._work_s += work_s
