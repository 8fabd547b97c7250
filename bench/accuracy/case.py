"""A deployment under a workload, and its twin in the simulator: same workers, policy, limits and arrivals."""

from __future__ import annotations

from dataclasses import dataclass

from bench.accuracy.correction import Spent, correct
from bench.goodput.experiment import MeasurePart
from bench.goodput.points import Point, Setting
from bench.goodput.simulated import IDS, simulated_at, timeout_of
from bench.goodput.sources import Source
from bench.goodput.variants import Variant
from bench.goodput.visit import spec_of
from bench.simulate.twin import Correction, Twin
from cluster.planner.goodput import Patience, highest_rate
from cluster.simulator.run import simulate
from cluster.workload.drawing import arrivals
from cluster.workload.jobs import Row
from cluster.workload.judge import judge
from cluster.workload.slo import Limits, Slo
from engine.latency import LatencyModel

_TARGET = 0.9
_SEARCHED = 300
"""Requests of a trial when the highest rate is searched in the simulator."""
_HOPS_APART, _HOPS_MIXED = 4, 2


@dataclass(frozen=True)
class Case:
    """limits: of all requests. profile: of a worker alone."""

    source: Source
    variant: Variant
    limits: Limits
    measure: MeasurePart
    profile: LatencyModel

    @property
    def setting(self) -> Setting:
        return Setting(self.source.name, self.variant.deployment, self.variant.setting)

    @property
    def slo(self) -> Slo:
        return Slo.fixed(self.limits.ttft_s, self.limits.tpot_s)

    def simulated(self, rate: float, seed: int, correction: Correction) -> list[Row]:
        """What `bench.goodput.visit.Visit.run_at` measures, simulated: the requests that are judged."""
        twin = Twin(self.variant.config, self.profile, correction)
        rows, _ = simulated_at(twin, self.source, rate, seed, self.limits, self.measure)
        return rows

    def corrected(self, point: Point) -> Correction:
        """So that the twin spends as long as the deployment did at that point."""
        real = Spent.of(point.rows, point.said["stages_s"])
        if real is None:
            return Correction()
        are_apart = not self.variant.config.mixed.replicas

        def twin(correction: Correction) -> Spent | None:
            rows = self.simulated(point.rate, seed_of(point.round), correction)
            return Spent.of(rows, judge(rows, self.slo, point.duration_s).stages)

        return correct(real, twin, _HOPS_APART if are_apart else _HOPS_MIXED, are_apart=are_apart)

    def saturation(self, correction: Correction) -> float | None:
        """The highest rate at which nine tenths are good, in the simulator; None if there is none."""
        slo, spec = self.slo, spec_of(self.source, IDS)
        twin = Twin(self.variant.config, self.profile, correction)

        def trial(rate: float, seed: int) -> tuple[int, int]:
            requests = arrivals(spec, seed, rate, count=_SEARCHED)
            cluster = twin.cluster(timeout_of(requests, self.limits, self.measure))
            patience = Patience(slo, _TARGET, len(requests))
            rows = simulate(cluster, requests, slo, seed, goes_on=patience.goes_on).rows
            found = judge(rows, slo, 1.0)
            return found.good, found.requests

        start = 0.5 * self.variant.readers / self.limits.ttft_s
        found = highest_rate(trial, _TARGET, start, (0,))
        return None if found.is_none else found.rate


def seed_of(number: int) -> int:
    """Of a round; that of the run which is not judged has a number below 0."""
    return number if number >= 0 else 1000 - number
