"""A workload that shifts, and what followed it, in a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

_COLORS = ("#1f6f8b", "#c8a45c", "#8d6a9f")
_ORACLE, _ROLES = "#606060", {"prefill": "#1f6f8b", "decode": "#c8553d", "mixed": "#588157"}


def draw_controller(result: Mapping[str, Any], target: Path) -> None:
    """Top: good requests/s over time, of the first seed. Below: the workers of each role meanwhile."""
    figure, (goods, roles) = pyplot.subplots(
        2, 1, figsize=(12, 8), sharex=True, layout="constrained", height_ratios=(2, 1)
    )
    phases = result["phases"]
    ends_s = list(accumulate(phase["seconds"] for phase in phases))
    _draw_goods(goods, result, ends_s)
    _draw_roles(roles, result, ends_s[-1])
    for axis in (goods, roles):
        for end_s in ends_s[:-1]:
            axis.axvline(end_s, color=_ORACLE, linewidth=1, linestyle=":")
        axis.spines[["top", "right"]].set_visible(False)
    slo = result["slo"]
    figure.suptitle(
        f"{result['devices']} devices, TTFT <= {slo['ttft_s']:g} s, TPOT <= {slo['tpot_s'] * 1000:g} ms, "
        f"{'simulated' if result['simulated'] else 'real'}",
        fontsize="medium",
    )
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def _draw_goods(axis: Axes, result: Mapping[str, Any], ends_s: list[float]) -> None:
    for phase, end_s in zip(result["phases"], ends_s, strict=True):
        begin_s, oracle = end_s - phase["seconds"], phase["oracle"]
        axis.plot([begin_s, end_s], [oracle["goodput"]] * 2, color=_ORACLE, linewidth=2, linestyle="--")
        axis.annotate(
            f"{phase['workload']}, {phase['rate']:g}/s\noracle: {oracle['shape']}",
            ((begin_s + end_s) / 2, 1.02), xycoords=("data", "axes fraction"), ha="center", fontsize="small",
        )  # fmt: skip
    for one, color in zip(result["deployments"], _COLORS, strict=True):
        name = one["name"] if "shapes" in one else f"{one['name']}: {one['begins_with']}"
        seconds, values = zip(*one["timeline"], strict=True)
        steps = [*seconds, ends_s[-1]], [*values, values[-1]]
        axis.step(*steps, where="post", color=color, label=f"{name}, {one['of_oracle_whole']:.0%}")
    axis.plot([], [], color=_ORACLE, linewidth=2, linestyle="--", label="oracle")
    axis.set(ylabel="good requests / s, by arrival in half-minutes", ylim=(0, None))
    axis.legend(loc="lower left", frameon=False)


def _draw_roles(axis: Axes, result: Mapping[str, Any], end_s: float) -> None:
    shapes = next(one["shapes"] for one in result["deployments"] if "shapes" in one)[0]
    seconds = [0.0, *(one["at_s"] for one in shapes[1:]), end_s]
    counts = [[int(number) for number in re.findall(r"\d+", one["shape"])] for one in shapes]
    counts.append(counts[-1])
    axis.stackplot(
        seconds, *zip(*counts, strict=True), step="post", labels=list(_ROLES), colors=list(_ROLES.values()),
        alpha=0.6,
    )  # fmt: skip
    axis.set(xlabel="seconds", ylabel="the controller's workers")
    axis.legend(loc="lower left", ncols=3)
