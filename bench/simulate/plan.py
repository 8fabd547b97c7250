"""From what people write on the command line of `prelay simulate` to what is simulated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from bench.load.options import arrivals_of, rates_of, source_of
from bench.simulate.kv import kv_bytes_of
from bench.simulate.profiles import KV_TOKENS, is_distserve, worker_profile
from bench.simulate.splits import Split
from cluster.simulator.cluster_spec import ClusterSpec, Fault, NetworkSpec, WorkerSpec
from cluster.simulator.distserve import Pool, simulate_distserve, simulate_distserve_colocated
from cluster.simulator.distserve_profile import DistServeProfile
from cluster.simulator.errors import SimulationError
from cluster.simulator.run import MAX_RUN, Outcome, simulate
from cluster.workload.datasets import TimedRows, load_dataset
from cluster.workload.drawing import Arrival, WorkloadSpec, arrivals, replay
from cluster.workload.slo import Slo
from router.pool_view import Role

COUNT = 1000
"""Requests at each rate, if nothing else is said."""

Simulate: TypeAlias = Callable[[Sequence[Arrival], Slo, int], Outcome]


@dataclass(frozen=True, slots=True)
class SimulatePlan:
    """rates: None is a trace's own pace. draw: arrivals for a seed and a rate. simulate: what becomes of
    them; undisturbed: without faults and noise. devices: that the cluster holds."""

    title: str
    rates: Sequence[float | None]
    seeds: int
    slo: Slo
    draw: Callable[[int, float | None], list[Arrival]]
    simulate: Simulate
    undisturbed: Simulate
    devices: int
    left_out: int


def plan_of(chosen: dict[str, Any]) -> SimulatePlan:
    """chosen: the options by name. Raises BadInputError, SimulationError."""
    draw, rates, left_out = _workload(chosen)
    run, devices, title = _cluster(chosen)
    undisturbed, _, _ = _cluster({**chosen, "faults": (), "noise": 0.0})
    slo = Slo.parse(chosen["slo_text"])
    return SimulatePlan(title, rates, chosen["seeds"], slo, draw, run, undisturbed, devices, left_out)


def _workload(
    chosen: dict[str, Any],
) -> tuple[Callable[[int, float | None], list[Arrival]], Sequence[float | None], int]:
    for flag in ("time_scale", "length_scale", "duration"):
        value = chosen[flag]
        if value is not None and not (math.isfinite(value) and value > 0):
            raise SimulationError(f"--{flag.replace('_', '-')} {value:g}: a number greater than 0 is needed")
    if chosen["duration"] is not None and chosen["count"] is not None:
        raise SimulationError("give either --duration or --count")
    rates = rates_of(chosen)
    dataset = load_dataset(source_of(chosen), chosen["length_scale"], chosen["max_tokens"])
    process = arrivals_of(chosen, rates, dataset)
    duration_s, count, scale = chosen["duration"], chosen["count"], chosen["time_scale"] or 1.0
    if not rates and isinstance(dataset, TimedRows) and duration_s is None:
        return partial(_replayed, dataset, scale, count), [None], dataset.left_out
    if duration_s is None and count is None:
        count = COUNT
    spec = WorkloadSpec(dataset, process, range(0), scale)

    def draw(seed: int, rate: float | None) -> list[Arrival]:
        return arrivals(spec, seed, rate, duration_s=duration_s, count=count)

    return draw, rates or [None], dataset.left_out


def _replayed(
    dataset: TimedRows, scale: float, count: int | None, seed: int, rate: float | None
) -> list[Arrival]:
    """The trace from its first row on, when it came."""
    return replay(dataset, seed, scale)[:count]


def _cluster(chosen: dict[str, Any]) -> tuple[Simulate, int, str]:
    splits = {role: Split.parse(f"--{role}", chosen[role]) for role in Role if chosen[role.value] is not None}
    match chosen["mode"]:
        case "distserve":
            return _distserve(chosen, splits)
        case "distserve-colocated":
            return _colocated(chosen, splits)
    return _prelay(chosen, splits)


def _distserve(chosen: dict[str, Any], splits: dict[Role, Split]) -> tuple[Simulate, int, str]:
    if Role.MIXED in splits:
        raise SimulationError(
            "--mixed: these rules have no such workers; there is --mode distserve-colocated"
        )
    prefill, decode = splits.get(Role.PREFILL, Split()), splits.get(Role.DECODE, Split())
    readers, writers = _pool(chosen, prefill), _pool(chosen, decode)

    def run(requests: Sequence[Arrival], slo: Slo, seed: int) -> Outcome:
        return Outcome.of(simulate_distserve(requests, readers, writers))

    return run, prefill.devices + decode.devices, f"{_said('prefill', prefill)}, {_said('decode', decode)}"


def _colocated(chosen: dict[str, Any], splits: dict[Role, Split]) -> tuple[Simulate, int, str]:
    given = list(dict.fromkeys(splits.values()))
    if len(given) > 1:
        raise SimulationError(
            "--mode distserve-colocated has workers of one kind: give --mixed, or --prefill and --decode "
            "that are alike"
        )
    both = given[0] if given else Split()
    pool = _pool(chosen, both)

    def run(requests: Sequence[Arrival], slo: Slo, seed: int) -> Outcome:
        return Outcome.of(simulate_distserve_colocated(requests, pool))

    return run, both.devices, _said("colocated", both)


def _pool(chosen: dict[str, Any], split: Split) -> Pool:
    path: Path = chosen["profile"]
    if not is_distserve(path):
        raise SimulationError(
            f"--profile {path}: --mode {chosen['mode']} needs a profile of DistServe's, with coefficients by "
            "model and tensor parallelism; this one is for --mode prelay"
        )
    profile = DistServeProfile.read(path)
    if chosen["model"] is None:
        raise SimulationError(f"--model NAME is missing: {path} has {', '.join(profile.models)}")
    return Pool(profile.step_times(profile.named(chosen["model"]), split.tp, split.pp), split.replicas)


def _prelay(chosen: dict[str, Any], splits: dict[Role, Split]) -> tuple[Simulate, int, str]:
    splits = splits or {Role.PREFILL: Split(), Role.DECODE: Split()}
    kv_bytes = kv_bytes_of(chosen)
    workers: list[WorkerSpec] = []
    for role, split in splits.items():
        profile = worker_profile(chosen["profile"], chosen["model"], split)
        spec = WorkerSpec(
            role.value,
            role,
            profile.latency,
            chosen["kv_tokens"] or profile.kv_tokens or KV_TOKENS,
            kv_bytes,
            split.tp * split.pp,
            max_batch_tokens=chosen["max_batch_tokens"],
            max_num_seqs=chosen["max_num_seqs"],
        )
        workers += [replace(spec, worker_id=f"{role.value}-{index}") for index in range(split.replicas)]
    network = NetworkSpec(bytes_per_s=chosen["link"] * 1e9)
    cluster = ClusterSpec(
        workers,
        chosen["policy"],
        network,
        noise=chosen["noise"],
        timeout_s=chosen["timeout"],
        faults=[_fault(text) for text in chosen["faults"]],
    )
    max_run = 1 if chosen["step_by_step"] else MAX_RUN

    def run(requests: Sequence[Arrival], slo: Slo, seed: int) -> Outcome:
        return simulate(cluster, requests, slo, seed, max_run)

    said = ", ".join(_said(role.value, split) for role, split in splits.items())
    return run, cluster.devices, f"{said}, {chosen['policy']}"


def _fault(text: str) -> Fault:
    """Raises SimulationError."""
    worker_id, _, times = text.partition(":")
    at, _, down = times.partition(":")
    try:
        at_s, down_s = float(at), float(down)
    except ValueError:
        at_s = down_s = math.nan
    if not (math.isfinite(at_s) and math.isfinite(down_s) and at_s >= 0 and down_s >= 0):
        raise SimulationError(f"--fault {text!r}: write it as WORKER:AT:DOWN in seconds, as in decode-0:30:5")
    return Fault(worker_id, at_s, down_s)


def _said(name: str, split: Split) -> str:
    return f"{split.replicas} {name} (TP {split.tp}, PP {split.pp})"
