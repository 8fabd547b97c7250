"""What came out: one object for programs, tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from bench.goodput.curves import Curve
from bench.goodput.figures import Figure
from bench.goodput.points import Point
from bench.goodput.record import Record
from bench.goodput.run import TARGETS, best_of
from cluster.workload.judge import judge
from cluster.workload.slo import Slo
from router.requests import Stage

_STAGES = tuple(stage.value for stage in Stage)


def result_of(
    curves: Mapping[str, Sequence[Curve]], record: Record, about: Mapping[str, Any]
) -> dict[str, Any]:
    """curves: by workload, all measured. devices: of the largest deployment; each also has its own."""
    return {
        "devices": max(curve.variant.devices for some in curves.values() for curve in some),
        **about,
        "workloads": [_workload(name, some, record) for name, some in curves.items()],
    }


def _workload(name: str, curves: Sequence[Curve], record: Record) -> dict[str, Any]:
    names = dict.fromkeys(curve.variant.deployment for curve in curves)
    source, limits = curves[0].source, curves[0].limits
    return {
        "name": name,
        "slo": {
            "ttft_s": limits.ttft_s,
            "tpot_s": limits.tpot_s,
            "ttft": str(source.slo.ttft),
            "tpot": str(source.slo.tpot),
        },
        "arrivals": str(source.arrivals),
        "left_out": source.dataset.left_out,
        "alone": [
            {"on": line["reference"], "times": line["times"]}
            for line in record.others("idle")
            if line["workload"] == name
        ],
        "deployments": [
            _deployment([curve for curve in curves if curve.variant.deployment == one], record.points)
            for one in names
        ],
    }


def _deployment(curves: Sequence[Curve], points: Sequence[Point]) -> dict[str, Any]:
    """curves: of its variants, the best of which counts, for each target."""
    measured = [curve for curve in curves if curve.of(points)]
    best = [max(measured, key=lambda curve: curve.figure(points, target).value) for target in TARGETS]
    at_90, at_99 = (curve.figure(points, target) for curve, target in zip(best, TARGETS, strict=True))
    curve = best[0]
    found = curve.at_crossing(points, TARGETS[0])
    judged = judge(
        [row for point in found for row in point.rows], _slo(curve), sum(p.duration_s for p in found)
    )
    counted = sum_counts(points=found)
    return {
        "name": curve.variant.deployment,
        "policy": curve.variant.policy,
        "devices": curve.variant.devices,
        "goodput_per_device_90": at_90.value,
        "ci90": None if at_90.interval is None else list(at_90.interval),
        "bound_90": at_90.bound,
        "setting_90": curve.variant.setting,
        "goodput_per_device_99": at_99.value,
        "ci99": None if at_99.interval is None else list(at_99.interval),
        "bound_99": at_99.bound,
        "setting_99": best[1].variant.setting,
        "attainment_by_length": {name: one.attainment for name, one in judged.by_length.items()},
        "at_crossing": {
            "rate": found[0].rate,
            **judged.to_json(),
            "stages_s": mean_stages(found),
            "counted": dict(counted),
            "false_refusals": false_refusals(counted),
        },
        "settings": [_setting(one, points) for one in measured] if len(measured) > 1 else [],
        "points": [_point(one, point) for one in best_of(measured, points) for point in one.of(points)],
    }


def _setting(curve: Curve, points: Sequence[Point]) -> dict[str, Any]:
    """A value that was tried. attainment: at each rate; where the lowest is too much, another was better."""
    mine = sorted(curve.of(points), key=lambda point: (point.rate, point.round))
    return {
        "setting": curve.variant.setting,
        "goodput_per_device_90": curve.figure(points, TARGETS[0]).to_json(),
        "attainment": [[point.rate, point.judged(curve.limits).attainment] for point in mine],
    }


def _point(curve: Curve, point: Point) -> dict[str, Any]:
    judged = point.judged(curve.limits)
    return {
        **point.said,
        "setting": point.of.setting,
        "round": point.round,
        "rate": point.rate,
        # Under the limits of the curve, which are not always those under which the point was measured.
        "attainment": judged.attainment,
        "goodput": judged.goodput,
        "outcomes": {outcome.value: count for outcome, count in judged.outcomes.items()},
        "by_length": {
            name: {"requests": one.requests, "good": one.good} for name, one in judged.by_length.items()
        },
    }


def _slo(curve: Curve) -> Slo:
    return Slo.fixed(curve.limits.ttft_s, curve.limits.tpot_s)


def mean_stages(points: Sequence[Point]) -> dict[str, float]:
    """Seconds of a complete answer in each stage, in the order of a request's life."""
    told = [point.said["stages_s"] for point in points if point.said["stages_s"]]
    known = [name for name in _STAGES if any(name in stages for stages in told)]
    names = dict.fromkeys((*known, *(name for stages in told for name in stages)))
    return {name: sum(stages.get(name, 0.0) for stages in told) / len(told) for name in names}


def sum_counts(points: Sequence[Point]) -> Counter[str]:
    """Of the routers, warm-ups included."""
    total = Counter[str]()
    for point in points:
        total.update(point.said["counted"])
    return total


def false_refusals(counted: Mapping[str, int]) -> float | None:
    """The share of all requests that were refused for being late, and for which there was room in time
    after all; None where nothing was counted."""
    asked = sum(count for name, count in counted.items() if name.startswith("admission."))
    return counted.get("could_have_served", 0) / asked if asked else None


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """A table for each workload; goodput per device, and how many times that of the best other one."""
    for workload in result["workloads"]:
        slo = workload["slo"]
        table = Table(
            "deployment",
            "policy",
            "devices",
            "goodput/device 90 % (90 % interval)",
            "99 %",
            "times the best other",
            "by length",
            title=f"{workload['name']}: TTFT <= {slo['ttft_s']:.3g} s ({slo['ttft']}), "
            f"TPOT <= {slo['tpot_s'] * 1000:.3g} ms ({slo['tpot']})",
        )
        for one in workload["deployments"]:
            others = [other["goodput_per_device_90"] for other in workload["deployments"] if other is not one]
            rival = max(others, default=0.0)
            table.add_row(
                one["name"],
                one["policy"] + (f"\n{one['setting_90']}" if one["setting_90"] else ""),
                str(one["devices"]),
                _figure(one, "90"),
                _figure(one, "99"),
                f"{one['goodput_per_device_90'] / rival:.2f}" if rival else "",
                ", ".join(f"{name} {share:.0%}" for name, share in one["attainment_by_length"].items()),
            )
        yield table


def _figure(one: Mapping[str, Any], target: str) -> str:
    interval = one[f"ci{target}"]
    return str(
        Figure(
            float(target) / 100,
            one[f"goodput_per_device_{target}"],
            None if interval is None else (interval[0], interval[1]),
            one[f"bound_{target}"],
        )
    )
