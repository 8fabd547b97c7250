"""The plane of (TTFT limit, TPOT limit, prompt : answer): who serves more there, and by how much.

What a policy that does not look at limits answers is the same under any, so its points are judged again in
every cell, and the search goes on until each cell has its crossing. A policy that does look gets runs of its
own in every cell.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.goodput.curves import Curve
from bench.goodput.experiment import Experiment, MapPart
from bench.goodput.limits import Idle
from bench.goodput.plan import plan_of
from bench.goodput.points import Point
from bench.goodput.record import Record
from bench.goodput.run import TARGETS, Plan, measure_idle_times, measure_visit
from bench.goodput.sources import Source, source_of_ratio
from bench.goodput.teller import Teller
from bench.goodput.venue import Venue
from cluster.workload.errors import BadInputError
from cluster.workload.slo import Slo

TARGET = TARGETS[0]


def map_plan(experiment: Experiment, shapes: Path, folder: Path) -> Plan:
    """Of an experiment with a part `map`; arguments as of `plan_of`. Raises BadInputError."""
    assert experiment.map is not None
    only = {name: experiment.deployments[name] for name in experiment.map.deployments}
    plan = plan_of(
        experiment.model_copy(update={"workloads": {}, "deployments": only}), shapes, folder, folder
    )
    if len({variant.policy for variants in plan.variants.values() for variant in variants}) == 1:
        raise BadInputError(
            "map.deployments: all have the same policy; name one with another to compare with"
        )
    return plan


async def measure_map(plan: Plan, record: Record, teller: Teller, venue: Venue) -> dict[str, Any]:
    """Of a plan by `map_plan`. Raises BadInputError, MeasurementError."""
    experiment = plan.experiment
    part = experiment.map
    assert part is not None
    longest = plan.references[0].config.model.max_model_len
    assert longest is not None
    cells = [(ttft, tpot, Slo.parse(f"ttft={ttft},tpot={tpot}")) for ttft in part.ttft for tpot in part.tpot]
    sources = [source_of_ratio(ratio, "ttft=3x,tpot=1.5x", longest) for ratio in part.lengths]
    visits = sum(len(cells) if one.sees_limits else 1 for some in plan.variants.values() for one in some)
    rounds = experiment.measure.rounds
    teller.expect(len(plan.references) + rounds * len(sources) * visits)
    idles = await measure_idle_times(plan.references, sources, record, teller, venue)
    curves = {source.name: _curves(plan, source, idles[source.name], cells) for source in sources}
    for number in range(rounds):
        for source in sources:
            rng = random.Random(f"map {number} {source.name}")
            for group in rng.sample(curves[source.name], len(curves[source.name])):
                name = group[0].variant.name
                with teller.part(f"map, round {number + 1} of {rounds}, {source.name}, {name}") as tell:
                    await measure_visit(
                        group, number, experiment, record, teller.line, tell, (TARGET,), venue=venue
                    )
    return map_result(part, cells, sources, curves, record.points)


def _curves(
    plan: Plan, source: Source, idle: Idle, cells: Sequence[tuple[str, str, Slo]]
) -> list[list[Curve]]:
    """What one start of a deployment is good for."""
    found: list[list[Curve]] = []
    for variants in plan.variants.values():
        for variant in variants:
            curves = [
                Curve(replace(source, slo=slo), variant, idle.limits(slo), idle.median) for _, _, slo in cells
            ]
            found += [[curve] for curve in curves] if variant.sees_limits else [curves]
    return found


def map_result(
    part: MapPart,
    cells: Sequence[tuple[str, str, Slo]],
    sources: Sequence[Source],
    curves: Mapping[str, Sequence[Sequence[Curve]]],
    points: Sequence[Point],
) -> dict[str, Any]:
    """ratio: goodput of the best deployment with the policy of the first, over that of the best other one;
    null where that has none."""
    planes = []
    for source, ratio in zip(sources, part.lengths, strict=True):
        every = [curve for group in curves[source.name] for curve in group]
        found = []
        for ttft, tpot, slo in cells:
            here = [curve for curve in every if curve.source.slo == slo]
            served = [_served(name, here, points) for name in part.deployments]
            ours, rivals = sides(served)
            own, rival = greatest(ours), greatest(rivals)
            found.append(
                {
                    "ttft": ttft,
                    "tpot": tpot,
                    "ttft_s": here[0].limits.ttft_s,
                    "tpot_s": here[0].limits.tpot_s,
                    "deployments": served,
                    "best": winner(served) if max(own, rival) else None,
                    "ratio": own / rival if rival else None,
                }
            )
        planes.append({"name": source.name, **ratio.model_dump(), "cells": found})
    return {"ttft": part.ttft, "tpot": part.tpot, "deployments": part.deployments, "planes": planes}


def _served(name: str, curves: Sequence[Curve], points: Sequence[Point]) -> dict[str, Any]:
    """The best variant of one deployment in one cell."""
    mine = [curve for curve in curves if curve.variant.deployment == name]
    figures = [(curve.figure(points, TARGET), curve.variant.setting) for curve in mine]
    figure, setting = max(figures, key=lambda one: one[0].value)
    return {
        "name": name,
        "policy": mine[0].variant.policy,
        "setting": setting,
        "goodput_per_device_90": figure.value,
        "ci90": None if figure.interval is None else list(figure.interval),
        "bound_90": figure.bound,
    }


def sides(served: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Of a cell: the deployments with the policy of the first, whatever their roles, and the others."""
    policy = served[0]["policy"]
    return [one for one in served if one["policy"] == policy], [
        one for one in served if one["policy"] != policy
    ]


def against(result: Mapping[str, Any]) -> str:
    """Who is compared with whom."""
    ours, rivals = (
        ", ".join(str(one["name"]) for one in side)
        for side in sides(result["planes"][0]["cells"][0]["deployments"])
    )
    return f"the best of {ours} over the best of {rivals}"


def winner(served: Sequence[Mapping[str, Any]]) -> str:
    """The best of them."""
    return str(max(served, key=lambda one: float(one["goodput_per_device_90"]))["name"])


def greatest(served: Sequence[Mapping[str, Any]]) -> float:
    """Goodput per device of the best of them."""
    return max(float(one["goodput_per_device_90"]) for one in served)


def map_tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """For each pair of lengths, goodput per device of the best on either side, and their ratio."""
    for plane in result["planes"]:
        table = Table(
            "TTFT \\ TPOT",
            *result["tpot"],
            title=f"prompts of {plane['prompt']}, answers of {plane['answer']}: requests/s and device at "
            f"90 %, {against(result)}",
        )
        for ttft in result["ttft"]:
            cells = [cell for cell in plane["cells"] if cell["ttft"] == ttft]
            table.add_row(ttft, *(_cell(cell) for cell in cells))
        yield table


def _cell(cell: Mapping[str, Any]) -> str:
    ours, rivals = sides(cell["deployments"])
    ratio = "" if cell["ratio"] is None else f" ({cell['ratio']:.2f}x)"
    return f"{greatest(ours):.3g} : {greatest(rivals):.3g}{ratio}"
