"""How fast the simulator is: requests it simulates a second, on one core, for a few kinds of simulation."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.latency_profile import read_profile
from cluster.planner.question import ModelTimes
from cluster.simulator.cluster_spec import ClusterSpec, WorkerSpec
from cluster.simulator.distserve import Pool, simulate_distserve
from cluster.simulator.run import simulate
from cluster.workload.drawing import Arrival
from cluster.workload.jobs import Row, Status
from cluster.workload.slo import Slo
from engine.latency import LatencyModel
from router.pool_view import Role

PROFILE = Path(__file__).parent.parent / "deploy" / "bench" / "opt-13b-a100.json"
"""Of OPT-13B on an A100 (docs/benchmarking.md says where it is from)."""

_KV_TOKENS, _KV_BYTES = 66_144, 819_200
_SLO = Slo.fixed(1.0, 0.1)

Show = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class SimulatorJob:
    """pairs: prefill workers, and as many decode workers."""

    name: str
    pairs: int
    run: Callable[[Sequence[Arrival]], Sequence[Row]]


def jobs_of(pairs: int) -> list[SimulatorJob]:
    """The kinds of simulation that are measured."""
    latency = read_profile(PROFILE)
    times = Pool(ModelTimes(latency, _KV_TOKENS), pairs, 10 * _KV_TOKENS)
    return [
        SimulatorJob("prelay, goodput", pairs, partial(_prelay, "goodput", pairs, latency)),
        SimulatorJob("prelay, least_loaded", pairs, partial(_prelay, "least_loaded", pairs, latency)),
        SimulatorJob("DistServe's rules", pairs, partial(_distserve, times)),
    ]


def measure(
    jobs: Sequence[SimulatorJob], arrivals: Sequence[Arrival], rounds: int, show: Show
) -> dict[str, Any]:
    """In turns, so that what drifts hits all alike. requests_s: of the first job, the median of rounds."""
    seconds: dict[str, list[float]] = {job.name: [] for job in jobs}
    complete: dict[str, int] = {}
    for number in range(rounds):
        for place, job in enumerate(jobs):
            show((number * len(jobs) + place) / (rounds * len(jobs)), job.name)
            began = time.perf_counter()
            rows = job.run(arrivals)
            seconds[job.name].append(time.perf_counter() - began)
            complete[job.name] = sum(row.status is Status.COMPLETE for row in rows)
    found = [_figures(job, len(arrivals), seconds[job.name], complete[job.name]) for job in jobs]
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"requests_s": found[0]["requests_s"], "jobs": found, "peak_memory_bytes": peak_bytes}


def _figures(job: SimulatorJob, count: int, seconds: Sequence[float], complete: int) -> dict[str, Any]:
    return {
        "name": job.name,
        "pairs": job.pairs,
        "requests": count,
        "complete": complete,
        "requests_s": count / statistics.median(seconds),
        "least": count / max(seconds),
        "greatest": count / min(seconds),
    }


def _prelay(policy: str, pairs: int, latency: LatencyModel, arrivals: Sequence[Arrival]) -> Sequence[Row]:
    workers = [
        WorkerSpec(
            f"{role}-{index}", role, latency, _KV_TOKENS, _KV_BYTES, max_batch_tokens=2048, max_num_seqs=128
        )
        for role in (Role.PREFILL, Role.DECODE)
        for index in range(pairs)
    ]
    return simulate(ClusterSpec(workers, policy), arrivals, _SLO).rows


def _distserve(pool: Pool, arrivals: Sequence[Arrival]) -> Sequence[Row]:
    return simulate_distserve(arrivals, pool, pool)
