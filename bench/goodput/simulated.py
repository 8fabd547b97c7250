"""Deployments in virtual time: the policies and schedulers that serve, with engines whose steps take what a
profile says. The same experiment in minutes, for as many devices as one likes.

What it leaves out is what a cluster at work adds to the profile (`prelay bench accuracy` says how much).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from bench.errors import MeasurementError
from bench.goodput.experiment import MeasurePart
from bench.goodput.limits import Typical
from bench.goodput.sources import Source
from bench.goodput.visit import Phase, Sent, Show, drawn_phases, num_requests, spec_of, window_s
from bench.simulate.measure import idle_point
from bench.simulate.twin import Correction, Twin
from cluster.config import ServeConfig
from cluster.simulator.run import Outcome, simulate
from cluster.workload.datasets import Shape
from cluster.workload.drawing import Arrival, arrivals
from cluster.workload.jobs import Row
from cluster.workload.judge import judge
from cluster.workload.slo import IdleTimes, Limits, Slo
from engine.latency import LatencyModel

IDS = range(100, 200)
_UNLIMITED_S = 1e6
_PAUSE_S = 0.001
"""In which Ctrl-C comes in."""


@dataclass(frozen=True, slots=True)
class Simulator:
    """profile: of a step of any worker."""

    profile: LatencyModel

    @asynccontextmanager
    async def visiting(self, config: ServeConfig, show: Show) -> AsyncIterator[SimulatedVisit]:
        """Nothing is started."""
        show("simulated")
        yield SimulatedVisit(config, self.profile)


@dataclass(frozen=True, slots=True)
class SimulatedVisit:
    """A deployment that would be up."""

    config: ServeConfig
    profile: LatencyModel

    async def idle_times(self, source: Source, typical: Typical, show: Show) -> IdleTimes:
        """What requests of a workload take alone. Raises SimulationError."""
        slo, points = Slo.fixed(_UNLIMITED_S, _UNLIMITED_S), []
        cluster = Twin(self.config, self.profile, Correction()).cluster(_UNLIMITED_S)
        for length in sorted(set(typical.lengths)):
            await asyncio.sleep(_PAUSE_S)
            [row] = simulate(cluster, [Arrival(0.0, Shape(length, typical.answer))], slo, 0).rows
            points.append(idle_point(row))
        return IdleTimes(points)

    async def run_at(
        self, source: Source, rate: float, seed: int, limits: Limits, measure: MeasurePart, show: Show
    ) -> tuple[float, list[Row], dict[str, Any]]:
        """Seconds that were judged, the rows of these, and what is to be said of them. Raises
        MeasurementError, SimulationError."""
        show("simulated")
        await asyncio.sleep(_PAUSE_S)
        twin = Twin(self.config, self.profile, Correction())
        rows, outcome = simulated_at(twin, source, rate, seed, limits, measure)
        duration_s, slo = window_s(measure, rate), Slo.fixed(limits.ttft_s, limits.tpot_s)
        if not rows:
            raise MeasurementError(f"{source.name}: at {rate:.3g}/s nothing arrives within {duration_s:g} s")
        said = {**judge(rows, slo, duration_s).to_json(), "counted": _counted(outcome), "client": {}}
        return duration_s, rows, said

    async def run_phases(
        self,
        source: Source,
        phases: Sequence[Phase],
        seed: int,
        limits: Limits,
        measure: MeasurePart,
        show: Show,
    ) -> Sent:
        """What comes of one rate after the other. Raises SimulationError."""
        show("simulated")
        await asyncio.sleep(_PAUSE_S)
        requests = [
            replace(one, arrival_s=begin_s + one.arrival_s)
            for begin_s, rate, count, own_seed in drawn_phases(phases, seed)
            for one in arrivals(spec_of(source, IDS), own_seed, rate, count=count)
        ]
        requests.sort(key=lambda one: one.arrival_s)
        cluster = Twin(self.config, self.profile, Correction()).cluster(timeout_of(requests, limits, measure))
        outcome = simulate(cluster, requests, Slo.fixed(limits.ttft_s, limits.tpot_s), seed)
        return Sent(list(outcome.rows), _counted(outcome), {})


def simulated_at(
    twin: Twin, source: Source, rate: float, seed: int, limits: Limits, measure: MeasurePart
) -> tuple[list[Row], Outcome]:
    """The requests that are judged of what `Visit.run_at` sends, and how all of them went. Raises
    BadInputError, SimulationError."""
    requests = arrivals(spec_of(source, IDS), seed, rate, count=num_requests(measure, rate))
    cluster = twin.cluster(timeout_of(requests, limits, measure))
    outcome = simulate(cluster, requests, Slo.fixed(limits.ttft_s, limits.tpot_s), seed)
    warmup_s = measure.warmup_s
    judged = [row for row in outcome.rows if row.arrival_s >= warmup_s]
    return [replace(row, arrival_s=row.arrival_s - warmup_s) for row in judged], outcome


def timeout_of(requests: Sequence[Arrival], limits: Limits, measure: MeasurePart) -> float:
    """As of a client that is measured: none that might still be good is given up."""
    longest = max((one.shape.output_tokens for one in requests), default=0)
    return max(measure.timeout_s, limits.ttft_s + limits.tpot_s * longest)


def _counted(outcome: Outcome) -> dict[str, int]:
    """As a router counts them."""
    placed = {f"placement.{kind}": count for kind, count in outcome.placements.items()}
    asked = {"admission.all": len(outcome.rows), "could_have_served": outcome.refused_in_vain}
    return {name: count for name, count in (placed | asked).items() if count}
