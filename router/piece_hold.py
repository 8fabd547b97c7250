"""How long a router that has too much to do holds tokens back, so that more of them go out in one piece.

Writing a piece costs a multiple of what taking a token from a worker does. What is held back is as little as
keeps the event loop from being busy all the time: it grows by steps while the loop is busier than that, and
shrinks while it is not. A router with time to spare holds nothing. A core.
"""

from __future__ import annotations

MOST_S = 0.03
_BUSY, _IDLE = 0.8, 0.75  # of one core: what gRPC's own threads take beside the loop is not counted
_LOOK_EVERY_S = 0.02
_STEP = 1.25
_MOST_STEPS = 32.0  # after which nothing is left
_LEAST_S = 0.001


class PieceHold:
    """Told of the loop's CPU time. seconds: what tokens are to be held back now."""

    def __init__(self, now: float, cpu_s: float) -> None:
        """cpu_s: that the loop's thread has taken so far."""
        self.seconds = 0.0
        self._now = now
        self._cpu_s = cpu_s

    def look(self, now: float, cpu_s: float) -> None:
        """To be called now and then; looks at no shorter spans than are worth it."""
        elapsed_s = now - self._now
        if elapsed_s < _LOOK_EVERY_S:
            return
        busy = (cpu_s - self._cpu_s) / elapsed_s
        self._now, self._cpu_s = now, cpu_s
        if busy > _BUSY:
            self.seconds = min(MOST_S, max(_LEAST_S, self.seconds * _STEP))
        elif busy < _IDLE:
            shorter_s = self.seconds / _STEP ** min(elapsed_s / _LOOK_EVERY_S, _MOST_STEPS)
            self.seconds = shorter_s if shorter_s >= _LEAST_S else 0.0
