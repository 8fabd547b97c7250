"""From what people write on the command line of `prelay plan` to a question, and to the kinds of workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.load.options import arrivals_of, source_of
from bench.simulate.kv import checkpoint_of, known_model, kv_bytes_of, model_of
from bench.simulate.profiles import is_distserve, worker_profile
from bench.simulate.splits import Split
from cluster.planner.errors import PlanError
from cluster.planner.hardware import Hardware, parse_devices
from cluster.planner.kinds import Kind, Kinds, ReckonedKinds
from cluster.planner.live import DEVICE, Live
from cluster.planner.measured import MeasuredKinds, WorkerKinds
from cluster.planner.memory import footprint
from cluster.planner.plans import Objective, Plan
from cluster.planner.question import SETTLE_S, Question
from cluster.planner.splitwise import SplitwiseKinds, SplitwiseProfile
from cluster.simulator.distserve_profile import DistServeProfile
from cluster.workload.datasets import Dataset, load_dataset
from cluster.workload.drawing import WorkloadSpec
from cluster.workload.slo import IdlePoint, IdleTimes, Slo

_LONG_S = 600.0
"""That a trial by DistServe's rules lasts: they are quick, and overload by these rules is slow to show."""


@dataclass(frozen=True, slots=True)
class Asked:
    """now: the plan that runs, if the question is about a running cluster. live: that cluster."""

    question: Question
    kinds: Sequence[Kind]
    live: Live | None = None
    now: Plan | None = None


def asked_of(chosen: dict[str, Any]) -> Asked:
    """chosen: the options by name. Raises BadInputError, PlanError, SimulationError, NoRouterError."""
    if chosen["context_parallel"] > 1:
        raise PlanError(
            f"--context-parallel {chosen['context_parallel']}: the engine cannot split a prompt over devices "
            "by its context yet; leave it at 1, long prompts can be split by --gpus with more TP"
        )
    live = None if chosen["live"] is None else Live.ask(chosen["live"], chosen["tls"])
    on_its_own = live is not None and chosen["gpus"] is None
    if on_its_own:
        for flag in ("profile", "model"):
            if chosen[flag] is not None:
                raise PlanError(f"--{flag} is for --gpus; without, --live plans with the workers that run")
        if chosen["objective"] != Objective.DEVICE.value:
            raise PlanError(
                f"--objective {chosen['objective']} is for --gpus; the workers that run cost the same "
                "whatever they do"
            )
        if chosen["mode"] == "distserve":
            raise PlanError("--mode distserve needs a --profile of DistServe's, and --gpus")
    elif chosen["gpus"] is None:
        raise PlanError("--gpus KIND:N is missing, or --live HOST:PORT of a cluster that runs")
    hardware = live.hardware if live is not None and on_its_own else _hardware(chosen)
    question = replace(_question(chosen, hardware, live), is_owned=on_its_own)
    for devices in hardware.devices:
        question.objective.of_gpu(devices.gpu)  # known before anything is measured
    if live is not None and on_its_own:
        kinds: Sequence[Kind] = live.kinds()
    else:
        kinds = _kinds(chosen, hardware).kinds(question.longest)
    if question.slo.is_relative:
        question = replace(question, slo=question.slo.with_idle(_idle(question, kinds)))
    now = live.plan() if live is not None and on_its_own else None
    return Asked(question, kinds, live, now)


def _hardware(chosen: dict[str, Any]) -> Hardware:
    path: Path | None = chosen["profile"]
    measured = path is not None and path.suffix != ".csv" and not is_distserve(path)
    devices = parse_devices(chosen["gpus"], unknown_link=DEVICE.link_bytes_per_s if measured else None)
    return Hardware(devices, chosen["per_node"], chosen["inter"] * 1e9)


def _question(chosen: dict[str, Any], hardware: Hardware, live: Live | None) -> Question:
    if not (math.isfinite(chosen["length_scale"]) and chosen["length_scale"] > 0):
        raise PlanError(f"--length-scale {chosen['length_scale']:g}: a number greater than 0 is needed")
    dataset: Dataset
    if live is not None and chosen["trace"] is None and chosen["dataset"] is None:
        for flag, default in (("length_scale", 1.0), ("max_tokens", None)):
            if chosen[flag] != default:
                raise PlanError(
                    f"--{flag.replace('_', '-')} is for --trace and --dataset; --live plans for the lengths "
                    "that came"
                )
        dataset = live.dataset
    else:
        dataset = load_dataset(source_of(chosen), chosen["length_scale"], chosen["max_tokens"])
    process = arrivals_of({**chosen, "time_scale": None}, [1.0], dataset)
    if chosen["slo_text"] is None and live is None:
        raise PlanError("--slo is missing: limits in seconds as in ttft=0.25,tpot=0.1, or multiples")
    return Question(
        WorkloadSpec(dataset, process, range(0)),
        Slo.parse(chosen["slo_text"]) if live is None or chosen["slo_text"] is not None else live.slo,
        hardware,
        chosen["target"],
        Objective(chosen["objective"]),
        chosen["count"],
        tuple(range(chosen["seeds"])),
        chosen["mode"] == "distserve",
        _LONG_S if chosen["mode"] == "distserve" else SETTLE_S,
        has_transfer=not chosen["no_transfer"],
        has_memory=not chosen["no_memory"],
    )


def _kinds(chosen: dict[str, Any], hardware: Hardware) -> Kinds:
    path: Path | None = chosen["profile"]
    if chosen["kv_tokens"] is not None and (path is None or path.suffix == ".csv" or is_distserve(path)):
        raise PlanError("--kv-tokens is for a --profile of `prelay profile`; else it is known, or reckoned")
    if path is None:
        if chosen["mode"] == "distserve":
            raise PlanError("--mode distserve needs a --profile of DistServe's")
        if chosen["model"] is None:
            raise PlanError("--model NAME is missing: a checkpoint, or a shape that comes with prelay")
        return ReckonedKinds(model_of(chosen["model"]), hardware)
    if path.suffix == ".csv":
        if chosen["mode"] == "distserve":
            raise PlanError(f"--mode distserve needs a --profile of DistServe's, which {path} is not")
        measured = SplitwiseProfile.read(path)
        if chosen["model"] is None:
            raise PlanError(f"--model NAME is missing: {path} has {', '.join(measured.models)}")
        return SplitwiseKinds(measured, chosen["model"], model_of(chosen["model"]), hardware)
    if not is_distserve(path):
        return _worker_kinds(path, chosen, hardware)
    profile = DistServeProfile.read(path)
    if chosen["model"] is None:
        raise PlanError(f"--model NAME is missing: {path} has {', '.join(profile.models)}")
    if len(hardware.devices) > 1:
        raise PlanError(f"--gpus {chosen['gpus']}: {path} was measured on devices of one kind; give one")
    if chosen["kv_bytes"] is None and chosen["mode"] != "distserve":
        raise PlanError(
            "--kv-bytes N is missing, the bytes of KV of a token (2 * layers * KV heads * head size * 2): "
            "the profile does not say it"
        )
    return MeasuredKinds(profile, profile.named(chosen["model"]), hardware, chosen["kv_bytes"] or 0)


def _worker_kinds(path: Path, chosen: dict[str, Any], hardware: Hardware) -> WorkerKinds:
    """Of what `prelay profile` has measured."""
    profile = worker_profile(path, None, Split())
    if chosen["mode"] == "distserve":
        raise PlanError(f"--mode distserve needs a --profile of DistServe's, which {path} is not")
    name = chosen["model"] or profile.model
    if name is not None and profile.model is not None and Path(name).name != profile.model:
        raise PlanError(f"--model {name}: {path} was measured with {profile.model}; profile that model")
    if len(hardware.devices) > 1:
        raise PlanError(f"--gpus {chosen['gpus']}: {path} was measured on devices of one kind; give one")
    model, gpu = None if name is None else known_model(name), hardware.devices[0].gpu
    room = chosen["kv_tokens"]
    if room is None and model is not None and gpu.memory_bytes:
        room = footprint(model, 1, 1, gpu.memory_bytes, "bfloat16").kv_tokens
    if room is None:
        raise PlanError(
            f"--kv-tokens N is missing, the room of a worker's KV cache: of {gpu.name} it cannot be reckoned"
        )
    return WorkerKinds(profile.latency, room, kv_bytes_of({**chosen, "model": name}), hardware)


def _idle(question: Question, kinds: Sequence[Kind]) -> IdleTimes:
    """Of the workload's usual request, on the fastest worker for each phase."""
    times = [question.idle(kind) for kind in kinds]
    prompt = round(question.mean_prompt)
    return IdleTimes([IdlePoint(prompt, min(one for one, _ in times), min(one for _, one in times))])


def model_section(name: str | None, question: Question, plan: Plan) -> dict[str, Any]:
    """The model's section of the configuration that the plan is, as far as it is known. name: --model."""
    longest = [pool.kind.kv_tokens for pool in plan.pools]
    section: dict[str, Any] = {}
    if name is not None:
        section["dtype"] = "bfloat16"
        if (path := checkpoint_of(name)) is not None:
            section["path"] = path
        if (model := known_model(name)) is not None:
            longest.append(model.max_position_embeddings)
    return {**section, "max_model_len": max(question.longest, min(longest))}
