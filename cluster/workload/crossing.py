"""The headline: the highest rate at which attainment is still what was promised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Crossing:
    """rate: requests/s at which attainment falls below `target`.

    bound: "" where it lies between measured rates; ">=" where attainment is still enough at the highest one,
    "<" where it is not even at the lowest one. rate is then that rate.
    """

    target: float
    rate: float
    bound: str = ""

    def __str__(self) -> str:
        return f"{self.bound} {self.rate:.3g}".strip()


@dataclass(frozen=True, slots=True)
class Headline:
    """The crossing of all seeds together, and of the seed with the least and the one with the greatest."""

    pooled: Crossing
    least: Crossing
    greatest: Crossing

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.pooled.target,
            "rate": self.pooled.rate,
            "bound": self.pooled.bound,
            "least": self.least.rate,
            "greatest": self.greatest.rate,
        }


def crossing(points: Mapping[float, tuple[int, int]], target: float) -> Crossing:
    """points: (good, requests) by rate. More load cannot help, so neighbours that say so are noise and are
    taken together (isotonic regression, by pooling adjacent violators); then on straight lines.

    Raises ValueError without points.
    """
    rates, attained = _falling(points)
    if attained[0] < target:
        return Crossing(target, rates[0], "<")
    for low, high, above, below in zip(rates, rates[1:], attained, attained[1:], strict=False):
        if below < target:
            return Crossing(target, low + (high - low) * (above - target) / (above - below))
    return Crossing(target, rates[-1], ">=")


def headline(seeds: Sequence[Mapping[float, tuple[int, int]]], target: float) -> Headline:
    """seeds: points as of `crossing`, of each seed."""
    rates = sorted({rate for points in seeds for rate in points})
    pooled: dict[float, tuple[int, int]] = {}
    for rate in rates:
        found = [points[rate] for points in seeds if rate in points]
        pooled[rate] = (sum(good for good, _ in found), sum(total for _, total in found))
    each = sorted(
        (crossing(points, target) for points in seeds),
        key=lambda found: (found.rate, {"<": 0, "": 1, ">=": 2}[found.bound]),
    )
    return Headline(crossing(pooled, target), each[0], each[-1])


def _falling(points: Mapping[float, tuple[int, int]]) -> tuple[list[float], list[float]]:
    """Rates, and the attainment at each that never rises and lies closest to the points."""
    if not points:
        raise ValueError("a crossing needs a rate at least")
    rates = sorted(points)
    blocks: list[tuple[int, int, int]] = []  # good, requests, rates
    for rate in rates:
        good, requests = points[rate]
        blocks.append((good, requests, 1))
        while len(blocks) > 1 and _share(blocks[-1]) > _share(blocks[-2]):
            later, earlier = blocks.pop(), blocks.pop()
            blocks.append((earlier[0] + later[0], earlier[1] + later[1], earlier[2] + later[2]))
    return rates, [_share(block) for block in blocks for _ in range(block[2])]


def _share(block: tuple[int, int, int]) -> float:
    return block[0] / block[1] if block[1] else 0.0
