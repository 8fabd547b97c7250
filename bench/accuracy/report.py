"""What came of it: one object for programs, a table and pictures for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.accuracy.run import Compare, Compared
from cluster.workload.judge import Judgement, Percentiles

_REAL, _SIMULATED, _BY_PROFILE = "#c8553d", "#1f6f8b", "#a8a8a8"
_QUANTILES = ("p50", "p90")


def to_json(found: Sequence[Compare]) -> dict[str, Any]:
    """What --json prints. Errors of attainment are in points, those of times relative to the real ones."""
    rows = [row for one in found for row in one.rows]
    below = [row.error_points for row in rows if not row.is_beyond]
    beyond = [row.error_points for row in rows if row.is_beyond]
    return {
        "rows": [_row_json(row) for row in rows],
        "cases": [
            {
                "workload": one.case.source.name,
                "deployment": one.case.variant.deployment,
                "saturation": one.saturation,
                "slo": {"ttft_s": one.case.limits.ttft_s, "tpot_s": one.case.limits.tpot_s},
                "correction": one.correction.to_json(),
            }
            for one in found
        ],
        "max_error_points": max((row.error_points for row in rows), default=0.0),
        "max_error_points_below": max(below, default=None),
        "max_error_points_beyond": max(beyond, default=None),
        "max_error_of_times": {
            name: max(
                (
                    abs(error)
                    for row in rows
                    if not row.is_beyond and (error := _errors(row)[name]) is not None
                ),
                default=None,
            )
            for name in _names()
        },
    }


def _names() -> Iterator[str]:
    for time in ("ttft", "tpot"):
        for quantile in _QUANTILES:
            yield f"{time}_{quantile}"


def _time(judged: Judgement, name: str) -> float | None:
    time, _, quantile = name.partition("_")
    found: Percentiles | None = judged.ttft if time == "ttft" else judged.tpot
    return None if found is None else float(getattr(found, quantile))


def _errors(row: Compared) -> dict[str, float | None]:
    """Simulated over real, less 1."""
    found: dict[str, float | None] = {}
    for name in _names():
        real, simulated = _time(row.real, name), _time(row.simulated, name)
        found[name] = simulated / real - 1 if real and simulated is not None else None
    return found


def _row_json(row: Compared) -> dict[str, Any]:
    times = {
        f"{name}_{what}_s": _time(judged, name)
        for name in _names()
        for what, judged in (("real", row.real), ("simulated", row.simulated))
    }
    return {
        "workload": row.case.source.name,
        "deployment": row.case.variant.deployment,
        "policy": row.case.variant.policy,
        "rate": row.rate,
        "of_saturation": row.of_saturation,
        "requests": row.real.requests,
        "attainment_real": row.real.attainment,
        "attainment_simulated": row.simulated.attainment,
        "attainment_by_profile": row.by_profile.attainment,
        "error_points": row.error_points,
        **times,
        **{f"{name}_error": error for name, error in _errors(row).items()},
    }


def table(found: Sequence[Compare]) -> Table:
    """As the second table of DistServe's paper: real beside simulated."""
    result = Table(
        "workload, deployment", "req/s", "of 90 % rate", "requests", "good: real", "simulated", "points",
        "by profile", "TTFT p50, ms", "TTFT p90", "TPOT p50", "TPOT p90",
        title="real / simulated",
    )  # fmt: skip
    for one in found:
        for row in one.rows:
            result.add_row(
                f"{one.case.source.name}, {one.case.variant.deployment}",
                f"{row.rate:.3g}",
                "-" if row.of_saturation is None else f"{row.of_saturation:.0%}",
                str(row.real.requests),
                f"{row.real.attainment:.1%}",
                f"{row.simulated.attainment:.1%}",
                f"{row.error_points:.1f}",
                f"{row.by_profile.attainment:.1%}",
                *(_pair(row, name) for name in _names()),
            )
    said = to_json(found)
    result.caption = (
        f"largest error of attainment: {_points(said['max_error_points_below'])} below the 90 % rate, "
        f"{_points(said['max_error_points_beyond'])} beyond"
    )
    return result


def _points(value: float | None) -> str:
    return "nothing measured" if value is None else f"{value:.1f} points"


def _pair(row: Compared, name: str) -> str:
    real, simulated = _time(row.real, name), _time(row.simulated, name)
    if real is None or simulated is None:
        return "-"
    return f"{real * 1000:.3g} / {simulated * 1000:.3g} ({simulated / real - 1:+.0%})"


def draw(found: Sequence[Compare], target: Path) -> None:
    """A row for each deployment: attainment, TTFT and TPOT over rate, real and simulated. Whiskers: what
    chance alone may do to a share of so many requests (a standard deviation each way)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(found), 3, figsize=(16, 4 * len(found)), layout="constrained", squeeze=False
    )
    for line, one in zip(axes, found, strict=True):
        rates = [row.rate for row in one.rows]
        shares = [row.real.attainment for row in one.rows]
        spread = [
            math.sqrt(s * (1 - s) / max(1, row.real.requests))
            for s, row in zip(shares, one.rows, strict=True)
        ]
        line[0].errorbar(rates, shares, yerr=spread, fmt="o", color=_REAL, capsize=3, label="real")
        line[0].plot(
            rates, [row.simulated.attainment for row in one.rows], color=_SIMULATED, label="simulated"
        )
        line[0].plot(
            rates, [row.by_profile.attainment for row in one.rows], color=_BY_PROFILE, linestyle=":",
            label="by the profile alone",
        )  # fmt: skip
        if one.saturation is not None:
            line[0].axvline(one.saturation, color="#606060", linestyle="--", linewidth=1)
        line[0].set(xlabel="offered, requests / s", ylabel="attainment (both limits)", ylim=(0, 1.03))
        line[0].set_title(f"{one.case.source.name}, {one.case.variant.deployment}", fontsize="medium")
        for axis, time in zip(line[1:], ("ttft", "tpot"), strict=True):
            limit_s = one.case.limits.ttft_s if time == "ttft" else one.case.limits.tpot_s
            for quantile, alpha in zip(_QUANTILES, (0.55, 1.0), strict=True):
                name = f"{time}_{quantile}"
                axis.plot(
                    rates, [_ms(_time(row.real, name)) for row in one.rows], "o", color=_REAL, alpha=alpha,
                    label=f"{quantile} real",
                )  # fmt: skip
                axis.plot(
                    rates, [_ms(_time(row.simulated, name)) for row in one.rows], color=_SIMULATED,
                    alpha=alpha, label=f"{quantile} simulated",
                )  # fmt: skip
            axis.axhline(limit_s * 1000, color="#606060", linestyle="--", linewidth=1)
            axis.set(xlabel="offered, requests / s", ylabel=f"{time.upper()}, ms", ylim=(0, None))
        for axis in line:
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, fontsize="small")
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def _ms(seconds: float | None) -> float:
    return math.nan if seconds is None else seconds * 1000
