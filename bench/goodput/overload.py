"""More than a deployment can serve, and what comes after it: runs at multiples of its own 90 % rate."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from bench.goodput.curves import Curve
from bench.goodput.phases import Phases, judged_overload, timeline
from bench.goodput.points import rows_from_json, rows_to_json
from bench.goodput.record import Record
from bench.goodput.run import Plan, best_of
from bench.goodput.teller import Teller
from bench.goodput.venue import Venue
from bench.goodput.visit import Show

FACTORS = (0.5, 1.0, 1.5, 3.0)


async def measure_overload(
    plan: Plan,
    curves: Mapping[str, Sequence[Curve]],
    record: Record,
    teller: Teller,
    venue: Venue,
) -> list[dict[str, Any]]:
    """curves: by workload, all measured. A result for each workload. Raises MeasurementError,
    SimulationError."""
    rounds, names = plan.experiment.measure.rounds, list(plan.variants)
    teller.expect(rounds * len(plan.sources) * len(names))
    chosen = {
        source.name: {
            name: best_of(
                [
                    curve
                    for curve in curves[source.name]
                    if curve.variant.deployment == name and curve.of(record.points)
                ],
                record.points,
            )[0]
            for name in names
        }
        for source in plan.sources
    }
    for number in range(rounds):
        for source in plan.sources:
            rng = random.Random(f"overload {number} {source.name}")
            for name in rng.sample(names, len(names)):
                title = f"overload, round {number + 1} of {rounds}, {source.name}, {name}"
                with teller.part(title) as tell:
                    await _visit(plan, chosen[source.name][name], number, record, teller, tell, venue)
    return [
        {
            "workload": source.name,
            "deployments": [_result(plan, chosen[source.name][name], record) for name in names],
        }
        for source in plan.sources
    ]


def saturation_of(curve: Curve, record: Record) -> float:
    """The 90 % rate, or the lowest that was measured if there is none. Kept with the first overload run, so
    that all rounds are at the same."""
    for line in _lines(curve, record):
        return float(line["saturation"])
    value = curve.figure(record.points, 0.9).value * curve.variant.devices
    return value or min(point.rate for point in curve.of(record.points))


async def _visit(
    plan: Plan, curve: Curve, number: int, record: Record, teller: Teller, tell: Show, venue: Venue
) -> None:
    done = {line["factor"] for line in _lines(curve, record) if line["round"] == number}
    missing = [factor for factor in FACTORS if factor not in done]
    if not missing:
        return
    saturation, measure = saturation_of(curve, record), plan.experiment.measure
    async with venue.visiting(curve.variant.under(curve.limits), tell) as visit:
        for factor in missing:
            phases = Phases.of(factor, saturation, measure.seconds, measure.warmup_s)

            def show(said: str, factor: float = factor) -> None:
                tell(f"{factor:g} times {saturation:.3g}/s: {said}")

            sent = await visit.run_phases(curve.source, phases.phases, number, curve.limits, measure, show)
            line = {
                "workload": curve.source.name,
                "deployment": curve.variant.deployment,
                "setting": curve.variant.setting,
                "limits": [curve.limits.ttft_s, curve.limits.tpot_s],
                "round": number,
                "factor": factor,
                "saturation": saturation,
                "rows": rows_to_json(sent.rows),
                "counted": sent.counted,
                "client": sent.client,
                "pace": sent.pace,
            }
            record.add("overload", line)
            found = judged_overload(sent.rows, curve.limits, phases, measure.warmup_s)
            recovery = "" if found.recovery_s is None else f", {_recovery(found.recovery_s)}"
            teller.line(
                f"{curve.source.name}, {curve.variant.name}, {factor:g} times {saturation:.3g}/s: "
                f"{found.attainment:.1%} good, {found.goodput:.3g}/s{recovery}"
            )


def _recovery(seconds: float) -> str:
    return "not normal again" if math.isinf(seconds) else f"normal again after {seconds:.1f} s"


def _lines(curve: Curve, record: Record) -> list[dict[str, Any]]:
    of = curve.setting
    limits = [curve.limits.ttft_s, curve.limits.tpot_s]
    return [
        line
        for line in record.others("overload")
        if (line["workload"], line["deployment"], line["setting"]) == (of.workload, of.deployment, of.setting)
        and line["limits"] == limits
    ]


def _result(plan: Plan, curve: Curve, record: Record) -> dict[str, Any]:
    """recovery_s: the longest of all rounds, null if it did not come. of_peak: goodput over the greatest at
    any of the factors."""
    measure, saturation = plan.experiment.measure, saturation_of(curve, record)
    factors: list[dict[str, Any]] = []
    for factor in FACTORS:
        phases = Phases.of(factor, saturation, measure.seconds, measure.warmup_s)
        lines = [line for line in _lines(curve, record) if line["factor"] == factor]
        runs = [rows_from_json(line["rows"]) for line in lines]
        found = [judged_overload(rows, curve.limits, phases, measure.warmup_s) for rows in runs]
        recoveries = [one.recovery_s for one in found if one.recovery_s is not None]
        longest = max(recoveries, default=float("inf"))
        factors.append(
            {
                "factor": factor,
                "goodput": statistics.fmean(one.goodput for one in found),
                "attainment": statistics.fmean(one.attainment for one in found),
                "recovery_s": None if longest == float("inf") else longest,
                "recovers": None if factor <= 1 else longest < float("inf"),
                "overload_s": [0.0, phases.end_s - phases.begin_s],
                "timeline": timeline(runs[0], curve.limits, phases.begin_s),
            }
        )
    peak = max(one["goodput"] for one in factors)
    for one in factors:
        one["of_peak"] = one["goodput"] / peak if peak else 0.0
    return {
        "name": curve.variant.deployment,
        "policy": curve.variant.policy,
        "setting": curve.variant.setting,
        "devices": curve.variant.devices,
        "saturation": saturation,
        "factors": factors,
    }


def overload_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Goodput as a share of the peak, and recovery."""
    table = Table(
        "workload",
        "deployment",
        "saturation",
        *(f"{factor:g}x" for factor in FACTORS),
        "normal again after",
        title="Goodput as a share of its peak, at multiples of each one's own 90 % rate",
    )
    for result in results:
        for one in result["deployments"]:
            late = [
                "never" if factor["recovery_s"] is None else f"{factor['recovery_s']:.0f} s"
                for factor in one["factors"]
                if factor["factor"] > 1
            ]
            shares = (f"{factor['of_peak']:.0%}" for factor in one["factors"])
            table.add_row(
                result["workload"], one["name"], f"{one['saturation']:.3g}/s", *shares, " / ".join(late)
            )
    return table
