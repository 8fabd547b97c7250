"""All rates and seeds of a plan, judged together, in the form of what `prelay bench serve` measures."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.load.client_use import ClientUse
from bench.load.serve import Measured, Run, ServePlan
from bench.load.target import ServerInfo
from bench.simulate.plan import SimulatePlan
from cluster.simulator.errors import SimulationError
from cluster.simulator.run import Outcome
from cluster.workload.arrivals import Arrivals, Process
from cluster.workload.datasets import Lengths, Shape
from cluster.workload.drawing import Arrival, WorkloadSpec
from cluster.workload.jobs import Row, Status
from cluster.workload.slo import IdlePoint, IdleTimes, Slo

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_MAX_ANSWER = 64
_NO_CLIENT = ClientUse(0.0, 0.0, 0.0)
_NO_LIMITS = Slo.fixed(1e6, 1e6)

_OF_SERVERS = (
    "requests_as", "salt", "client", "client_cpu_share", "slo_sent", "arrivals", "time_scale", "warmup_s",
    "timeout_s",
)  # fmt: skip
"""Of what is said of a measured server: what a simulation has not, or was told on its command line."""

Show = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class Simulated:
    """measured: as of a server. requests, outcomes: of its runs, in their order."""

    measured: Measured
    requests: Sequence[Sequence[Arrival]]
    outcomes: Sequence[Outcome]
    plan: SimulatePlan
    wall_s: float

    def to_json(self) -> dict[str, Any]:
        """What --json prints; of a single rate, its figures also stand at the top."""
        result = self.measured.to_json()
        for name in _OF_SERVERS:
            result.pop(name, None)
        for rate in result["rates"]:
            rate.pop("client", None)
            rate.pop("client_cpu_share", None)
            rate.update(self._marginal(rate["rate"]))
        if len(result["rates"]) == 1:
            result.update(self._marginal(result["rates"][0]["rate"]))
        placements = Counter[str]()
        for outcome in self.outcomes:
            placements.update(outcome.placements)
        return {
            "cluster": self.plan.title,
            **result,
            "placements": dict(placements),
            "preemptions": sum(outcome.preemptions for outcome in self.outcomes),
            "refused_in_vain": sum(outcome.refused_in_vain for outcome in self.outcomes),
            "wall_s": self.wall_s,
            "requests_per_wall_s": sum(len(run.rows) for run in self.measured.runs) / self.wall_s,
        }

    def _marginal(self, rate: float | None) -> dict[str, float]:
        """Shares of all requests that meet one limit, whatever becomes of the other."""
        rows = [row for run in self.measured.of(rate) for row in run.judged]
        slo, met = self.measured.slo, Counter[str]()
        for row in rows:
            if row.status is Status.COMPLETE and row.ttft_s is not None and row.tpot_s is not None:
                limits = slo.limits(row.prompt_tokens)
                met["ttft"] += row.ttft_s <= limits.ttft_s
                met["tpot"] += row.tpot_s <= limits.tpot_s
        total = max(1, len(rows))
        return {"ttft_attainment": met["ttft"] / total, "tpot_attainment": met["tpot"] / total}


def measure(plan: SimulatePlan, show: Show) -> Simulated:
    """show: told the share that is done, and what comes. Raises SimulationError, BadInputError."""
    drawn = [(seed, rate, plan.draw(seed, rate)) for seed in range(plan.seeds) for rate in plan.rates]
    for _, rate, requests in drawn:
        if not requests:
            raise SimulationError(f"at a rate of {rate} no request arrives: simulate for longer")
    slo = _with_idle(plan, [one for _, _, requests in drawn for one in requests])
    runs: list[Run] = []
    outcomes: list[Outcome] = []
    began = time.perf_counter()
    for number, (seed, rate, requests) in enumerate(drawn):
        pace = "the trace's pace" if rate is None else f"{rate:g}/s"
        show(number / len(drawn), f"{pace}, seed {seed + 1} of {plan.seeds}")
        outcome = plan.simulate(requests, slo, seed)
        outcomes.append(outcome)
        rows = outcome.rows
        duration_s = len(requests) / rate if rate else max(requests[-1].arrival_s, 1e-9)
        runs.append(Run(rate, seed, rows, 0, duration_s, _NO_CLIENT))
    wall_s = time.perf_counter() - began
    measured = Measured(_serve_plan(plan), _INFO, slo, runs)
    return Simulated(measured, [one for _, _, one in drawn], outcomes, plan, wall_s)


_INFO = ServerInfo("simulated", None, None, "simulated")


def _serve_plan(plan: SimulatePlan) -> ServePlan:
    """As far as what was measured is asked for it."""
    spec = WorkloadSpec(Lengths([], plan.left_out), Arrivals(Process.TRACE), range(0))
    return ServePlan(spec, plan.rates, plan.seeds, None, None, 0.0, plan.slo, 0.0, True, None, plan.devices)


def _with_idle(plan: SimulatePlan, requests: Sequence[Arrival]) -> Slo:
    """Raises SimulationError for limits that not even the request that is fastest alone can meet."""
    lengths = [one.shape.prompt_tokens for one in requests]
    probes = sorted({int(one) for one in np.quantile(lengths, _QUANTILES, method="nearest")})
    answer = max(2, min(_MAX_ANSWER, round(statistics.median(one.shape.output_tokens for one in requests))))
    points = []
    for length in probes:
        [row] = plan.undisturbed([Arrival(0.0, Shape(length, answer))], _NO_LIMITS, 0).rows
        points.append(idle_point(row))
    idle = IdleTimes(points)
    for name, limit, alone_s in (
        ("ttft", plan.slo.ttft, min(point.ttft_s for point in points)),
        ("tpot", plan.slo.tpot, min(point.tpot_s for point in points)),
    ):
        if not limit.relative and limit.value < alone_s:
            raise SimulationError(
                f"--slo: {name} is {limit.value:g} s, but a request alone on this cluster takes "
                f"{alone_s:.3g} s: none could be good; give at least that, or a multiple such as {name}=2x"
            )
    return plan.slo.with_idle(idle) if plan.slo.is_relative else plan.slo


def idle_point(row: Row) -> IdlePoint:
    """Of a request that was alone. Raises SimulationError."""
    if row.status is not Status.COMPLETE or row.ttft_s is None or row.tpot_s is None:
        raise SimulationError(f"a request of {row.prompt_tokens} tokens, alone, is {row.status}: {row.error}")
    return IdlePoint(row.prompt_tokens, row.ttft_s, row.tpot_s)
