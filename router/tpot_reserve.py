"""How far below its limits the TPOT of a batch has to stay: learned from how answers fared. A core.

Step times are predicted well on average, but the TPOT of an answer also depends on who joins after it, who
stays longer than expected, and how long its first steps waited. What these add is not predicted; it shows
in how many answers are slow that should not be. A reserve that is a little too small costs answers, one that
is too large costs batches: so it is moved until MISSES of the answers are slow (by pinball updates, Koenker
and Bassett 1978), and is nothing while all are within their limits.
"""

from __future__ import annotations

import math

MISSES = 0.05
_RATE = 0.02
_MOST = math.log(1.25)


class TpotReserve:
    """Predicted times are multiplied with `factor`, which is at least 1, before they are held against
    limits."""

    def __init__(self) -> None:
        self._log = 0.0
        self.factor = 1.0

    def observe(self, expected_s: float, limit_s: float, observed_s: float) -> None:
        """An answer has ended, whose TPOT was expected when it was placed. One that was not expected within
        its limit says nothing."""
        if expected_s > limit_s:
            return
        step = _RATE * (1 - MISSES if observed_s > limit_s else -MISSES)
        self._log = min(_MOST, max(0.0, self._log + step))
        self.factor = math.exp(self._log)
