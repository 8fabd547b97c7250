"""Attainment over rate of one variant under one pair of limits, from all points that say something of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from bench.goodput.experiment import MeasurePart
from bench.goodput.figures import Figure, Round, figure_of
from bench.goodput.points import Point, Setting
from bench.goodput.search import Counts, Grid, next_place
from bench.goodput.sources import Source
from bench.goodput.variants import Variant
from bench.goodput.visit import least_rate
from cluster.workload.slo import Limits

_SAME = 1e-9
_START_SHARE = 0.5
"""The search begins where the workers that read prompts would be busy for such a share of the time."""


@dataclass(frozen=True, slots=True)
class Curve:
    """alone: of a request of median length, which says where to begin."""

    source: Source
    variant: Variant
    limits: Limits
    alone: Limits

    @property
    def setting(self) -> Setting:
        return Setting(self.source.name, self.variant.deployment, self.variant.setting)

    def of(self, points: Sequence[Point]) -> list[Point]:
        """Those of its variant; under other limits, too, where the policy does not look at them."""
        return [
            point
            for point in points
            if point.of == self.setting
            and (
                not self.variant.sees_limits
                or (
                    abs(point.limits.ttft_s - self.limits.ttft_s) < _SAME
                    and abs(point.limits.tpot_s - self.limits.tpot_s) < _SAME
                )
            )
        ]

    def next_place(
        self,
        points: Sequence[Point],
        number: int,
        measure: MeasurePart,
        targets: Sequence[float],
        rival_rate: float | None = None,
        start_rate: float | None = None,
    ) -> int | None:
        """What round `number` has to measure next; None if it has enough. rival_rate: at which another
        variant of the same deployment attains the first target; it begins there, and has enough once it does
        less. start_rate: where to begin otherwise; by what a request takes alone if it is None."""
        mine = [point for point in self.of(points) if point.round <= number]
        own = {point.place for point in mine if point.round == number}
        grid = Grid(measure.step)
        counts, least = self._counts(mine), grid.place(least_rate(measure)) + 1
        start = grid.place(
            rival_rate or start_rate or _START_SHARE * self.variant.readers / self.alone.ttft_s
        )
        if rival_rate is not None and any(
            good < targets[0] * requests for place, (good, requests) in counts.items() if place <= start
        ):
            return None
        return next_place(counts, own, targets, start, least, grid.wide)

    def figure(self, points: Sequence[Point], target: float, rounds: Collection[int] | None = None) -> Figure:
        """Over all rounds that are there, or over some. Raises ValueError if there are none."""
        by_round: dict[int, Round] = {}
        for point in self.of(points):
            if rounds is None or point.round in rounds:
                judged = point.judged(self.limits)
                counts = (judged.good, judged.requests)
                by_round[point.round] = {**by_round.get(point.round, {}), point.rate: counts}
        if not by_round:
            raise ValueError(f"{self.variant.name} has not been measured under {self.source.name}")
        return figure_of([by_round[number] for number in sorted(by_round)], target, self.variant.devices)

    def at_crossing(self, points: Sequence[Point], target: float) -> list[Point]:
        """Of the highest rate at which attainment still is `target`, or of the lowest there is."""
        mine = self.of(points)
        found = self.figure(points, target)
        rates = sorted({point.rate for point in mine})
        reached = [rate for rate in rates if rate <= found.value * self.variant.devices * (1 + _SAME)]
        return [point for point in mine if point.rate == (reached[-1] if reached else rates[0])]

    def _counts(self, points: Sequence[Point]) -> Counts:
        counts: dict[int, tuple[int, int]] = {}
        for point in points:
            judged = point.judged(self.limits)
            good, requests = counts.get(point.place, (0, 0))
            counts[point.place] = (good + judged.good, requests + judged.requests)
        return counts
