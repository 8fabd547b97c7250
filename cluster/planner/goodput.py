"""The highest rate at which enough of the requests are good, found by trying. A core."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.workload.crossing import Crossing, crossing
from cluster.workload.jobs import Row
from cluster.workload.judge import Outcome, outcome_of
from cluster.workload.slo import Slo

Trial = Callable[[float, int], tuple[int, int]]
"""Rate and seed to (good, requests)."""

GIVE_UP = 2.0
"""A trial is given up at so many times the misses that it may have."""
_STEP = 1.3
_MOST_TRIALS = 8
_LEAST = 1 / 256
"""Of the rate that a search begins at: there requests no longer meet each other."""


@dataclass(frozen=True, slots=True)
class Goodput:
    """rate: requests/s, of all seeds together; least, greatest: with those of single seeds (of one that
    attains it nowhere, the lowest rate). points: (good, requests) of all seeds, by rate. is_none: not even
    the lowest rate attains it."""

    rate: float
    least: float
    greatest: float
    points: dict[float, tuple[int, int]]
    is_none: bool = False


class Patience:
    """Ends a simulation that cannot turn out well: after GIVE_UP times the misses that it may have. Those
    that come while the cluster fills count as well, for they have it easier than the others."""

    def __init__(self, slo: Slo, target: float, requests: int) -> None:
        """requests: that are judged."""
        self._slo = slo
        self._left = GIVE_UP * (1 - target) * requests

    def goes_on(self, number: int, row: Row) -> bool:
        """To be told of each request that has ended."""
        self._left -= outcome_of(row, self._slo) is not Outcome.GOOD
        return self._left > 0


def highest_rate(
    trial: Trial,
    target: float,
    start: float,
    seeds: Sequence[int],
    tolerance: float = 0.05,
    most: float = math.inf,
) -> Goodput:
    """start: the rate to begin with. tolerance: neighbours of the rate are no further apart than that share.
    most: beyond which nobody wants to know.

    Goes up or down, in steps that grow, until attainment lies on both sides of the target, then halves the
    distance. Does not go down further than to where fewer requests would make no difference.
    """
    by_seed: dict[int, dict[float, tuple[int, int]]] = {seed: {} for seed in seeds}

    def attains(rate: float) -> bool:
        for seed in seeds:
            if rate not in by_seed[seed]:
                by_seed[seed][rate] = trial(rate, seed)
        counts = [by_seed[seed][rate] for seed in seeds]
        return sum(good for good, _ in counts) >= target * sum(total for _, total in counts)

    low = high = start = min(start, most)
    least = _LEAST * start
    is_enough, step = attains(start), _STEP
    while len(by_seed[seeds[0]]) < _MOST_TRIALS:
        if (is_enough and high >= most) or (not is_enough and low <= least):
            break
        low, high = (high, min(most, high * step)) if is_enough else (max(least, low / step), low)
        step *= step
        if attains(high if is_enough else low) != is_enough:
            break
    are_sides = low < high and attains(low) and not attains(high)
    while are_sides and high / low > 1 + tolerance and len(by_seed[seeds[0]]) < 2 * _MOST_TRIALS:
        middle = (low * high) ** 0.5
        if attains(middle):
            low = middle
        else:
            high = middle
    pooled = {
        rate: (sum(by_seed[seed][rate][0] for seed in seeds), sum(by_seed[seed][rate][1] for seed in seeds))
        for rate in sorted(by_seed[seeds[0]])
    }
    found = crossing(pooled, target)
    each = [crossing(points, target).rate for points in by_seed.values()]
    rate = _rate(found)
    return Goodput(rate, min(rate, *each), max(rate, *each), pooled, is_none=found.bound == "<")


def _rate(found: Crossing) -> float:
    return 0.0 if found.bound == "<" else found.rate
