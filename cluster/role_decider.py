"""When to change workers' roles, by what the simulator says of the shapes that are within reach. A core:
told the time and the forecasts, so that what it decided can be replayed from its log.

Some other shape has to promise more than the present one by a margin, for several looks in a row; after a
change there is a pause. So noise in forecasts, and a workload that swings faster than workers can
follow, change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from router.pool_view import Role


@dataclass(frozen=True, slots=True)
class Shape:
    """Workers of each role."""

    prefill: int
    decode: int
    mixed: int

    @property
    def can_serve(self) -> bool:
        """Decode workers get their prompts from prefill workers only."""
        if self.decode and not self.prefill:
            return False
        return bool(self.mixed or (self.prefill and self.decode))

    def neighbours(self) -> list[Shape]:
        """What one worker's change of role leads to, as far as it can serve."""
        found = []
        for giver in Role:
            for taker in Role:
                if giver is not taker and getattr(self, giver.value):
                    moved = {
                        giver.value: getattr(self, giver.value) - 1,
                        taker.value: getattr(self, taker.value) + 1,
                    }
                    found.append(replace(self, **moved))
        return [shape for shape in found if shape.can_serve]

    def __str__(self) -> str:
        return f"{self.prefill} prefill + {self.decode} decode + {self.mixed} mixed"


class Verdict(StrEnum):
    """STAY: no other shape is better. WAIT: one is, but not for long enough, or it is too soon. CHANGE: to
    the best."""

    STAY = "stay"
    WAIT = "wait"
    CHANGE = "change"


@dataclass(frozen=True, slots=True)
class Decision:
    """best: of the others, the one that promises most. gain: over the present shape, in attainment. looks:
    for how many in a row there has been one that gains enough."""

    verdict: Verdict
    best: Shape
    gain: float
    looks: int
    why: str


class RoleDecider:
    """delta: what a change has to gain, in attainment. patience: looks. cool_down_s: after a change."""

    def __init__(self, delta: float = 0.05, patience: int = 3, cool_down_s: float = 60.0) -> None:
        self.delta = delta
        self._patience = patience
        self._cool_down_s = cool_down_s
        self._beaten: Shape | None = None
        self._looks = 0
        self._not_before = float("-inf")

    def look(self, now: float, present: Shape, forecasts: Mapping[Shape, float]) -> Decision:
        """forecasts: attainment, of the present shape and of others; of none if they cannot gain enough.
        Whoever gets CHANGE makes it."""
        others = {shape: share for shape, share in forecasts.items() if shape != present}
        best = max(others, key=lambda shape: others[shape], default=present)
        gain = forecasts[best] - forecasts[present]
        if gain <= self.delta:
            self._beaten, self._looks = None, 0
            return Decision(Verdict.STAY, best, gain, 0, f"nothing gains more than {self.delta:.0%}")
        self._looks = self._looks + 1 if self._beaten == present else 1
        self._beaten = present
        looks = self._looks
        if looks < self._patience:
            return Decision(Verdict.WAIT, best, gain, looks, f"seen {looks} of {self._patience} times")
        if now < self._not_before:
            left_s = self._not_before - now
            return Decision(Verdict.WAIT, best, gain, looks, f"{left_s:.0f} s of the pause are left")
        self._beaten, self._looks = None, 0
        self._not_before = now + self._cool_down_s
        return Decision(Verdict.CHANGE, best, gain, looks, f"others were better {looks} times in a row")
