"""The headline of a deployment: goodput per device at a target of attainment, with an interval over rounds.

Goodput at a target is the highest offered rate at which joint attainment reaches it: all rounds pooled, made
monotone, on straight lines between neighbouring rates (`cluster.workload.crossing`). The interval is a
bootstrap: rounds, each a seed of its own, are drawn with replacement, and the 5th and 95th percentiles of
their crossings are given. Of one round there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.workload.crossing import crossing

_DRAWS = 500
_PERCENTILES = (5, 95)

Round = Mapping[float, tuple[int, int]]
"""(good requests, requests) by rate."""


@dataclass(frozen=True, slots=True)
class Figure:
    """Requests per second and device. bound: ">=" if even the highest measured rate was not too much, "<" if
    the lowest was; then there is no goodput at this target, and value is 0."""

    target: float
    value: float
    interval: tuple[float, float] | None
    bound: str

    def __str__(self) -> str:
        if self.bound == "<":
            return "none"
        text = f"{self.bound} {self.value:.3g}".strip()
        return text if self.interval is None else f"{text} ({self.interval[0]:.3g} - {self.interval[1]:.3g})"

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "value": self.value,
            "interval": None if self.interval is None else list(self.interval),
            "bound": self.bound,
        }


def figure_of(rounds: Sequence[Round], target: float, devices: int) -> Figure:
    """rounds: at least one, with a rate each at least."""
    whole = crossing(_pooled(rounds), target)
    value = 0.0 if whole.bound == "<" else whole.rate / devices
    if len(rounds) == 1:
        return Figure(target, value, None, whole.bound)
    rng = np.random.default_rng(len(rounds))
    draws = [
        _of_draw(_pooled([rounds[index] for index in chosen]), target) / devices
        for chosen in rng.integers(len(rounds), size=(_DRAWS, len(rounds)))
    ]
    low, high = (float(found) for found in np.percentile(draws, _PERCENTILES))
    # A draw may miss the rates on one side of the crossing, and so all draws may lie beside the whole.
    return Figure(target, value, (min(low, value), max(high, value)), whole.bound)


def _of_draw(pooled: Round, target: float) -> float:
    """Where even the lowest rate of a draw is too much, on the line from there to a rate of 0, where all
    would be good: the other rounds have seen that lower rates are possible."""
    found = crossing(pooled, target)
    if found.bound != "<":
        return found.rate
    good, requests = pooled[found.rate]
    attained = good / requests if requests else 0.0
    return found.rate * min(1.0, (1 - target) / (1 - attained))


def _pooled(rounds: Sequence[Round]) -> dict[float, tuple[int, int]]:
    pooled: dict[float, tuple[int, int]] = {}
    for one in rounds:
        for rate, (good, requests) in one.items():
            before = pooled.get(rate, (0, 0))
            pooled[rate] = (before[0] + good, before[1] + requests)
    return pooled
