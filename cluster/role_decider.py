"""When to change workers' roles, and how many there are, by what the simulator says of the shapes that are
within reach. A core: told the time and the forecasts, so that what it decided can be replayed from its log.

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

    @property
    def size(self) -> int:
        return self.prefill + self.decode + self.mixed

    def resized(self, by: int) -> list[Shape]:
        """With one worker more, or with one less, of any role, as far as that can serve."""
        sizes = {role.value: getattr(self, role.value) + by for role in Role}
        found = [replace(self, **{name: size}) for name, size in sizes.items() if size >= 0]
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


class _Persistence:
    """A wish has to last for some looks in a row, and after a change there is a pause."""

    def __init__(self, cool_down_s: float) -> None:
        self._cool_down_s = cool_down_s
        self._wish: object = None
        self._looks = 0
        self._not_before = float("-inf")

    def look(self, now: float, wish: object, patience: int) -> tuple[Verdict, int, str]:
        """wish: None is none. Returns the verdict, for how many looks it has been the same wish, and why."""
        if wish is None:
            self._wish, self._looks = None, 0
            return Verdict.STAY, 0, ""
        self._looks = self._looks + 1 if self._wish == wish else 1
        self._wish = wish
        looks = self._looks
        if looks < patience:
            return Verdict.WAIT, looks, f"seen {looks} of {patience} times"
        if now < self._not_before:
            return Verdict.WAIT, looks, f"{self._not_before - now:.0f} s of the pause are left"
        self._wish, self._looks = None, 0
        self._not_before = now + self._cool_down_s
        return Verdict.CHANGE, looks, f"seen {looks} times in a row"


class RoleDecider:
    """delta: what a change has to gain, in attainment. patience: looks. cool_down_s: after a change."""

    def __init__(self, delta: float = 0.05, patience: int = 3, cool_down_s: float = 60.0) -> None:
        self.delta = delta
        self._patience = patience
        self._persistence = _Persistence(cool_down_s)

    def look(self, now: float, present: Shape, forecasts: Mapping[Shape, float]) -> Decision:
        """forecasts: attainment, of the present shape and of others; of none if they cannot gain enough.
        Whoever gets CHANGE makes it."""
        others = {shape: share for shape, share in forecasts.items() if shape != present}
        best = max(others, key=lambda shape: others[shape], default=present)
        gain = forecasts[best] - forecasts[present]
        wish = present if gain > self.delta else None
        verdict, looks, why = self._persistence.look(now, wish, self._patience)
        return Decision(verdict, best, gain, looks, why or f"nothing gains more than {self.delta:.0%}")


class SizeDecider:
    """Whether there should be a worker more, or one less, where roles are as good as they can be.

    least, most: workers. target: attainment that is to be kept. delta: what another worker has to gain, and
    how far beyond the target one less has to stay. patience, rest: looks before there is one more, and
    before there is one less, which can wait.
    """

    def __init__(
        self,
        least: int,
        most: int,
        target: float = 0.9,
        delta: float = 0.05,
        patience: int = 3,
        rest: int = 30,
        cool_down_s: float = 120.0,
    ) -> None:
        self._least, self._most = least, most
        self._target, self._delta = target, delta
        self._patience, self._rest = patience, rest
        self._persistence = _Persistence(cool_down_s)

    def candidates(self, present: Shape, share: float) -> list[Shape]:
        """What is to be forecast, if the present shape attains `share`."""
        if share < self._target and present.size < self._most:
            return present.resized(+1)
        if share >= self._target + self._delta and present.size > self._least:
            return present.resized(-1)
        return []

    def look(self, now: float, present: Shape, forecasts: Mapping[Shape, float]) -> Decision:
        """forecasts: attainment of the present shape and of its candidates. Whoever gets CHANGE makes it."""
        others = {shape: share for shape, share in forecasts.items() if shape != present}
        best = max(others, key=lambda shape: others[shape], default=present)
        gain, step = forecasts[best] - forecasts[present], best.size - present.size
        wanted = gain > self._delta if step > 0 else forecasts[best] >= self._target + self._delta
        wish = (present, step) if step and wanted else None
        verdict, looks, why = self._persistence.look(now, wish, self._patience if step > 0 else self._rest)
        return Decision(verdict, best, gain, looks, why or "there are as many workers as are needed")

    def stay(self, now: float) -> None:
        """Roles come first."""
        self._persistence.look(now, None, 0)
