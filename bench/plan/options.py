"""From what people write on the command line of `prelay plan` to a question, and to the kinds of workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.load.options import arrivals_of, source_of
from bench.simulate.kv import model_of
from cluster.planner.errors import PlanError
from cluster.planner.hardware import Hardware, parse_devices
from cluster.planner.kinds import Kind, Kinds, ReckonedKinds
from cluster.planner.measured import MeasuredKinds
from cluster.planner.plans import Objective
from cluster.planner.question import Question
from cluster.simulator.distserve_profile import DistServeProfile
from cluster.workload.datasets import load_dataset
from cluster.workload.drawing import WorkloadSpec
from cluster.workload.slo import IdlePoint, IdleTimes, Slo

_LONG_S = 600.0
"""That a trial by DistServe's rules lasts: they are quick, and overload by these rules is slow to show."""


def question_of(chosen: dict[str, Any]) -> tuple[Question, Sequence[Kind]]:
    """chosen: the options by name. Raises BadInputError, PlanError, SimulationError."""
    hardware = Hardware(parse_devices(chosen["gpus"]), chosen["per_node"], chosen["inter"] * 1e9)
    if not (math.isfinite(chosen["length_scale"]) and chosen["length_scale"] > 0):
        raise PlanError(f"--length-scale {chosen['length_scale']:g}: a number greater than 0 is needed")
    dataset = load_dataset(source_of(chosen), chosen["length_scale"], chosen["max_tokens"])
    process = arrivals_of({**chosen, "time_scale": None}, [1.0], dataset)
    question = Question(
        WorkloadSpec(dataset, process, range(0)),
        Slo.parse(chosen["slo_text"]),
        hardware,
        chosen["target"],
        Objective(chosen["objective"]),
        chosen["count"],
        tuple(range(chosen["seeds"])),
        chosen["mode"] == "distserve",
        *((_LONG_S,) if chosen["mode"] == "distserve" else ()),
    )
    kinds = _kinds(chosen, hardware).kinds(question.longest)
    if question.slo.is_relative:
        question = replace(question, slo=question.slo.with_idle(_idle(question, kinds)))
    return question, kinds


def _kinds(chosen: dict[str, Any], hardware: Hardware) -> Kinds:
    path: Path | None = chosen["profile"]
    if path is None:
        if chosen["mode"] == "distserve":
            raise PlanError("--mode distserve needs a --profile of DistServe's")
        if chosen["model"] is None:
            raise PlanError("--model NAME is missing: a checkpoint, or a shape that comes with prelay")
        return ReckonedKinds(model_of(chosen["model"]), hardware)
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


def _idle(question: Question, kinds: Sequence[Kind]) -> IdleTimes:
    """Of the workload's usual request, on the fastest worker for each phase."""
    times = [question.idle(kind) for kind in kinds]
    prompt = round(question.mean_prompt)
    return IdleTimes([IdlePoint(prompt, min(one for one, _ in times), min(one for _, one in times))])
