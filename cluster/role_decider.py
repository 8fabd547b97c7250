"""When to change a worker's role, by what the simulator says of the shapes that one change leads to. A core:
told the time and the forecasts, so that what it decided can be replayed from its log.

A shape has to promise more than the present one by a margin, and be the best for several looks in a row;
after a change there is a pause. So noise in forecasts, and a workload that swings faster than workers can
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
    it."""

    STAY = "stay"
    WAIT = "wait"
    CHANGE = "change"


@dataclass(frozen=True, slots=True)
class Decision:
    """best: of the neighbours, the one that promises most. gain: over the present shape, in attainment.
    looks: for how many in a row it has been the best, by enough."""

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
        self._candidate: tuple[Shape, Shape] | None = None
        self._looks = 0
        self._not_before = float("-inf")

    def look(self, now: float, present: Shape, forecasts: Mapping[Shape, float]) -> Decision:
        """forecasts: attainment, of the present shape and of others; of none if they cannot gain enough.
        Whoever gets CHANGE makes it."""
        others = {shape: share for shape, share in forecasts.items() if shape != present}
        best = max(others, key=lambda shape: others[shape], default=present)
        gain = forecasts[best] - forecasts[present]
        if gain <= self.delta:
            self._candidate, self._looks = None, 0
            return Decision(Verdict.STAY, best, gain, 0, f"nothing gains more than {self.delta:.0%}")
        self._looks = self._looks + 1 if self._candidate == (present, best) else 1
        self._candidate = present, best
        looks = self._looks
        if looks < self._patience:
            return Decision(Verdict.WAIT, best, gain, looks, f"seen {looks} of {self._patience} times")
        if now < self._not_before:
            left_s = self._not_before - now
            return Decision(Verdict.WAIT, best, gain, looks, f"{left_s:.0f} s of the pause are left")
        self._candidate, self._looks = None, 0
        self._not_before = now + self._cool_down_s
        return Decision(Verdict.CHANGE, best, gain, looks, f"the best {looks} times in a row")
