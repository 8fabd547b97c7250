"""What `prelay bench goodput` measured, in pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

from bench.goodput.plane import against, greatest, sides, winner

_COLORS = ("#1f6f8b", "#c8553d", "#588157", "#c8a45c", "#8d6a9f", "#606060", "#9cc5d3", "#e3b7a0")
_STAGES = (
    "#d9d9d9", "#c8a45c", "#1f6f8b", "#588157", "#8d6a9f", "#e3b7a0", "#9cc5d3", "#c8553d", "#606060",
)  # fmt: skip
_TARGET = 0.9
_SIMULATED = "simulated"


def draw_goodput(result: Mapping[str, Any], target: Path, *, is_simulated: bool = False) -> None:
    """A row for each workload: attainment over rate, goodput per device, and where the time goes at the
    highest rate that attains 90 %."""
    workloads = result["workloads"]
    figure, axes = pyplot.subplots(
        len(workloads), 3, figsize=(17, 4.2 * len(workloads)), layout="constrained", squeeze=False
    )
    for row, workload in zip(axes, workloads, strict=True):
        _draw_curves(row[0], workload)
        _draw_bars(row[1], workload["deployments"])
        _draw_stages(row[2], workload["deployments"])
        for axis in row:
            axis.spines[["top", "right"]].set_visible(False)
    if is_simulated:
        figure.suptitle(_SIMULATED)
    _save(figure, target)


def _draw_curves(axis: Axes, workload: Mapping[str, Any]) -> None:
    slo = workload["slo"]
    for one, color in zip(workload["deployments"], _cycle(len(workload["deployments"])), strict=True):
        rates, attained = _pooled([point for point in one["points"] if point["setting"] == one["setting_90"]])
        per_device = [rate / one["devices"] for rate in rates]
        axis.plot(per_device, attained, color=color, marker="o", markersize=4, label=one["name"])
        if not one["bound_90"]:
            axis.plot(one["goodput_per_device_90"], _TARGET, "D", color=color, markersize=8)
        if one["ci90"]:
            axis.plot(one["ci90"], [_TARGET] * 2, color=color, linewidth=4, alpha=0.4)
    axis.axhline(_TARGET, color="#606060", linestyle="--", linewidth=1)
    axis.set(xlabel="offered, requests / s and device", ylabel="attainment (both limits)", ylim=(0, 1.03))
    axis.set_xlim(left=0)
    axis.set_title(
        f"{workload['name']}: TTFT <= {slo['ttft_s']:.3g} s, TPOT <= {slo['tpot_s'] * 1000:.3g} ms",
        fontsize="medium",
    )
    axis.legend(frameon=False, fontsize="small")


def _pooled(points: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    counts: dict[float, tuple[int, int]] = {}
    for point in points:
        good, requests = counts.get(point["rate"], (0, 0))
        counts[point["rate"]] = (good + point["outcomes"].get("good", 0), requests + point["requests"])
    rates = sorted(counts)
    return rates, [counts[rate][0] / counts[rate][1] for rate in rates]


def _draw_bars(axis: Axes, deployments: Sequence[Mapping[str, Any]]) -> None:
    """Whiskers: the interval over rounds. The pale part: what serves 99 %."""
    for place, (one, color) in enumerate(zip(deployments, _cycle(len(deployments)), strict=True)):
        value, interval = one["goodput_per_device_90"], one["ci90"]
        whiskers = [[value - interval[0]], [interval[1] - value]] if interval else None
        axis.bar(place, value, width=0.7, color=color, yerr=whiskers, capsize=4)
        axis.bar(place, one["goodput_per_device_99"], width=0.35, color="white", alpha=0.55)
        top = interval[1] if interval else value
        written = "none" if one["bound_90"] == "<" else f"{one['bound_90']}{value:.2f}"
        axis.annotate(
            written, (place, top), (0, 3), textcoords="offset points",
            ha="center", va="bottom", fontsize="small",
        )  # fmt: skip
    axis.set_xticks(
        range(len(deployments)),
        ["\n".join(filter(None, (one["name"], one["setting_90"]))) for one in deployments],
        fontsize="x-small",
        rotation=20,
    )
    axis.set_ylabel("goodput, requests / s and device")
    axis.set_title("at 90 % (inside: at 99 %)", fontsize="medium")


def _draw_stages(axis: Axes, deployments: Sequence[Mapping[str, Any]]) -> None:
    stages = [one["at_crossing"]["stages_s"] for one in deployments]
    bottoms = np.zeros(len(stages))
    for name, color in zip(dict.fromkeys(name for one in stages for name in one), _STAGES, strict=False):
        heights = np.array([one.get(name, 0.0) for one in stages])
        if heights.max(initial=0.0) > 0:
            axis.bar(range(len(stages)), heights, bottom=bottoms, width=0.7, color=color, label=name)
        bottoms += heights
    names = [f"{one['name']}\n{one['at_crossing']['rate'] / one['devices']:.2g}/s" for one in deployments]
    axis.set_xticks(range(len(stages)), names, fontsize="x-small", rotation=20)
    axis.set_ylabel("mean seconds of an answer")
    axis.set_title("where the time goes, at the highest rate with 90 %", fontsize="medium")
    axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)


def draw_map(result: Mapping[str, Any], target: Path, *, is_simulated: bool = False) -> None:
    """A panel for each pair of lengths; blue where the policy of the first deployment serves more, red where
    another does."""
    planes = result["planes"]
    figure, axes = pyplot.subplots(
        1, len(planes), figsize=(5.2 * len(planes), 4.8), layout="constrained", squeeze=False
    )
    image = None
    for axis, plane in zip(axes[0], planes, strict=True):
        shape = len(result["ttft"]), len(result["tpot"])
        shades = np.array([_shade(cell) for cell in plane["cells"]]).reshape(shape)
        image = axis.imshow(shades, cmap="RdBu", vmin=-1.5, vmax=1.5, aspect="auto")
        for number, cell in enumerate(plane["cells"]):
            row, column = divmod(number, shape[1])
            color = "white" if abs(_shade(cell)) > 1 else "black"
            axis.text(column, row, _words(cell), ha="center", va="center", fontsize="small", color=color)
        axis.set_xticks(range(shape[1]), result["tpot"])
        axis.set_yticks(range(shape[0]), result["ttft"])
        axis.set(xlabel="TPOT limit", ylabel="TTFT limit")
        axis.set_title(f"prompts of {plane['prompt']}, answers of {plane['answer']}", fontsize="medium")
    assert image is not None
    bar = figure.colorbar(image, ax=axes, ticks=[-1, 0, 1])
    bar.set_ticklabels(["half", "equal", "twice"])
    how = f", {_SIMULATED}" if is_simulated else ""
    figure.suptitle(f"Goodput per device at 90 %{how}: {against(result)}")
    _save(figure, target)


def _shade(cell: Mapping[str, Any]) -> float:
    """The ratio's logarithm to base 2; the end of the scale where only one serves at all."""
    if cell["best"] is None:
        return 0.0
    if cell["ratio"] is None:
        return 1.5
    return float(np.clip(np.log2(max(cell["ratio"], 0.01)), -1.5, 1.5))


def _words(cell: Mapping[str, Any]) -> str:
    if cell["best"] is None:
        return "none"
    ours, rivals = sides(cell["deployments"])
    ratio = "only these" if cell["ratio"] is None else f"{cell['ratio']:.2f}x"
    lines = [ratio, f"{greatest(ours):.2f} : {greatest(rivals):.2f}"]
    return "\n".join([*lines, winner(ours)] if len(ours) > 1 and greatest(ours) else lines)


def draw_overload(results: Sequence[Mapping[str, Any]], target: Path, *, is_simulated: bool = False) -> None:
    """A row for each workload, a panel for each overload: attainment over time."""
    factors = [one["factor"] for one in results[0]["deployments"][0]["factors"] if one["factor"] > 1]
    figure, axes = pyplot.subplots(
        len(results),
        len(factors),
        figsize=(8 * len(factors), 3.6 * len(results)),
        layout="constrained",
        squeeze=False,
    )
    for row, result in zip(axes, results, strict=True):
        for axis, factor in zip(row, factors, strict=True):
            _draw_timeline(axis, result["deployments"], factor)
            axis.set_title(f"{result['workload']}: {factor:g} times saturation", fontsize="medium")
            axis.spines[["top", "right"]].set_visible(False)
    if is_simulated:
        figure.suptitle(_SIMULATED)
    _save(figure, target)


def _draw_timeline(axis: Axes, deployments: Sequence[Mapping[str, Any]], factor: float) -> None:
    for one, color in zip(deployments, _cycle(len(deployments)), strict=True):
        found = next(each for each in one["factors"] if each["factor"] == factor)
        times, attained = zip(*found["timeline"], strict=True) if found["timeline"] else ((), ())
        axis.plot(times, attained, color=color, label=one["name"])
        axis.axvspan(*found["overload_s"], color="#c9d6db", alpha=0.4 / len(deployments), linewidth=0)
    axis.set(
        xlabel="s since the overload began", ylabel="attainment, by arrival in the last 5 s", ylim=(0, 1.03)
    )
    axis.legend(frameon=False, fontsize="small")


def _cycle(count: int) -> list[str]:
    return [_COLORS[number % len(_COLORS)] for number in range(count)]


def _save(figure: Any, target: Path) -> None:
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
