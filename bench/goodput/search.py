"""Which rate to measure next, on a geometric grid of rates that all deployments and rounds share.

The search knows only how many requests were good at which place of the grid. It goes out in wide steps until
attainment lies on both sides of a target, halves the distance until the two sides are neighbours, and wants
each round to have measured both of these itself. It goes by all rounds so far together, so one unlucky run
does not lead it astray for long.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster.workload.crossing import crossing

Counts = Mapping[int, tuple[int, int]]
"""(good requests, requests) by place on the grid."""

_WIDE = 2.0
"""Factor of a wide step."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Rates step ** place, requests per second."""

    step: float

    def rate(self, place: int) -> float:
        return float(self.step**place)

    def place(self, rate: float) -> int:
        """Of the greatest rate on the grid that is not above `rate`."""
        return math.floor(math.log(rate) / math.log(self.step) + 1e-9)

    @property
    def wide(self) -> int:
        """Places of a wide step."""
        return max(1, round(math.log(_WIDE) / math.log(self.step)))


def next_place(
    counts: Counts, own: Collection[int], targets: Sequence[float], start: int, least: int, wide: int
) -> int | None:
    """counts: of all rounds up to this one. own: places that this round has measured. start: to begin at.
    least: the lowest place that is worth it. wide: places of a wide step. None when nothing is missing."""
    if not counts:
        return max(start, least)
    for target in targets:
        found = crossing({float(place): count for place, count in counts.items()}, target)
        if found.bound == ">=":
            return max(counts) + wide
        if found.bound == "<":
            if (lowest := min(counts)) > least:
                return max(least, lowest - wide)
            sides = [lowest]
        else:
            low = max(place for place in counts if place <= found.rate)
            high = min(place for place in counts if place > found.rate)
            if high - low > 1:
                return (low + high) // 2
            sides = [low, high]
        for place in sides:
            if place not in own:
                return place
    return None
