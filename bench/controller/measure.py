"""The controller on a workload that shifts, against an oracle, and against roles that stay; all simulated.

    oracle       knows what each phase brings: has, from its beginning to its end, the shape that serves it
                 best, with nothing to change and nothing left over from the phase before
    controller   begins with the oracle's first shape, and sees only what comes
    first stays  the same shape all along
    best stays   of all shapes that are good for a phase, the one that serves the whole best

Whoever changes roles pays for it: workers are drained, away, and come back with empty caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.controller.contenders import Controlled, Watched, kind_of, reshaping
from bench.controller.phases import Phase, Shift
from bench.controller.report import CONTROLLER, Best, Judge, Ran, check_possible, report, shapes_of
from bench.simulate.twin import Correction, Twin
from cluster.config import ServeConfig
from cluster.planner.hardware import Devices, Hardware
from cluster.planner.live import DEVICE
from cluster.role_decider import RoleDecider, Shape
from cluster.role_forecast import forecast, question_about
from cluster.simulator.cluster_spec import ClusterSpec
from cluster.simulator.run import simulate
from cluster.workload.drawing import Arrival
from cluster.workload.jobs import Row
from cluster.workload.judge import Outcome, outcome_of
from cluster.workload.slo import Limits, Slo
from engine.latency import LatencyModel
from router.pool_view import Role

_CANDIDATES = 3
"""Shapes that the oracle tries out, of those that promise most."""

Show = Callable[[float, str], None]


@dataclass(frozen=True)
class Experiment:
    """config: of a cluster, under the limits; it has as many workers as there are. profile: of a worker's
    steps. away_s: of a worker that changes its role."""

    config: ServeConfig
    profile: LatencyModel
    shift: Shift
    limits: Limits
    seeds: int
    away_s: float

    @property
    def num_workers(self) -> int:
        return sum(pool.replicas for pool in self.config.pools.values())

    @property
    def slo(self) -> Slo:
        return Slo.fixed(self.limits.ttft_s, self.limits.tpot_s)

    def run(self, shape: Shape, requests: Sequence[Arrival], seed: int, shaper: Watched) -> Sequence[Row]:
        """A cluster that begins with that shape. Raises SimulationError, BadInputError."""
        workers = {role: self._twin.worker(role) for role in Role}
        how = reshaping(shaper, workers, self.away_s)
        return simulate(self._cluster(shape, requests), requests, self.slo, seed, reshaping=how).rows

    def controlled(self) -> Controlled:
        kind = kind_of({role: self._twin.worker(role) for role in Role})
        return Controlled(kind, self.slo, self.num_workers, RoleDecider())

    def promising(self, phase: Phase) -> list[Shape]:
        """What the oracle tries out. Raises SimulationError, BadInputError."""
        kind = kind_of({role: self._twin.worker(role) for role in Role})
        hardware = Hardware([Devices(DEVICE, self.num_workers * kind.devices)])
        shapes = shapes_of(self.num_workers)
        asked = question_about(phase.source.dataset, self.slo, hardware)
        shares = dict(zip(shapes, forecast(asked, [kind], shapes, phase.rate), strict=True))
        return sorted(shapes, key=lambda shape: -shares[shape])[:_CANDIDATES]

    @property
    def _twin(self) -> Twin:
        return Twin(self.config, self.profile, Correction())

    def _cluster(self, shape: Shape, requests: Sequence[Arrival]) -> ClusterSpec:
        pools = {
            role.value: self.config.pools[role.value].model_copy(
                update={"replicas": getattr(shape, role.value)}
            )
            for role in Role
        }
        longest = max(one.shape.output_tokens for one in requests)
        timeout_s = self.limits.ttft_s + self.limits.tpot_s * longest
        return replace(self._twin, config=self.config.model_copy(update=pools)).cluster(timeout_s)


def measure(experiment: Experiment, show: Show) -> dict[str, Any]:
    """Raises SimulationError, BadInputError."""
    shift = experiment.shift
    seeds = range(experiment.seeds)
    best: list[Best] = []
    candidates: list[Shape] = []
    known: dict[tuple[str, float], Best] = {}
    for number, phase in enumerate(shift.phases):
        key = phase.source.name, phase.rate
        if key not in known:
            show(0.2 * number / len(shift.phases), f"the best shapes for {phase.source.name}")
            promising = experiment.promising(phase)
            candidates += [shape for shape in promising if shape not in candidates]
            goods = {shape: _alone(experiment, shape, phase, number) for shape in promising}
            shape = max(goods, key=lambda one: goods[one])
            known[key] = shape, goods[shape]
        best.append(known[key])
    check_possible(best, experiment.num_workers)
    first = best[0][0]
    whole = {seed: shift.arrivals(seed) for seed in seeds}
    fixed = {}
    for number, shape in enumerate(candidates):
        show(0.2 + 0.3 * number / len(candidates), f"{shape}, which stay")
        fixed[shape] = [experiment.run(shape, whole[seed], seed, Watched()) for seed in seeds]
    judge = Judge(shift, experiment.limits)
    best_fixed = max(
        candidates, key=lambda shape: sum(judge.whole(judge.goods(rows)) for rows in fixed[shape])
    )
    runs, changes, looks = [], [], []
    for seed in seeds:
        show(0.5 + 0.5 * seed / len(seeds), f"the controller, seed {seed}")
        shaper = experiment.controlled()
        runs.append(experiment.run(first, whole[seed], seed, shaper))
        changes.append([{"at_s": at_s, "shape": str(shape)} for at_s, shape in shaper.shapes])
        looks.append([look.to_json() for look in shaper.looks])
    ran = [
        Ran(CONTROLLER, first, runs, {"shapes": changes, "looks": looks}),
        Ran("first stays", first, fixed[first]),
        Ran("best stays", best_fixed, fixed[best_fixed]),
    ]
    devices = experiment.num_workers * experiment.config.mixed.num_ranks
    return {"simulated": True, **report(judge, devices, best, ran)}


def _alone(experiment: Experiment, shape: Shape, phase: Phase, number: int) -> float:
    """Good requests/s of a cluster to which only that phase happens."""
    good = 0
    for seed in range(experiment.seeds):
        requests = experiment.shift.of_phases(seed)[number]
        rows = experiment.run(shape, requests, seed, Watched())
        good += sum(outcome_of(row, experiment.slo) is Outcome.GOOD for row in rows)
    return good / experiment.seeds / phase.seconds
