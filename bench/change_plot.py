"""A deployment that changed under load, in a picture: goodput, attainment, and every request's two
latencies."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from bench.change import Changed
from cluster.workload.judge import Outcome, outcome_of

_GOOD, _BAD, _CHANGE = "#1f6f8b", "#c8553d", "#c8a45c"


def draw_change(changed: Changed, title: str, target: Path) -> None:
    """Top: good requests/s and attainment of the last 5 s; below: TTFT and TPOT over their limits."""
    figure, axes = pyplot.subplots(3, 1, figsize=(12, 8), sharex=True, layout="constrained")
    curve = changed.curve()
    seconds = [second for second, _, _ in curve]
    axes[0].fill_between(seconds, [rate for _, rate, _ in curve], color=_GOOD, alpha=0.35, linewidth=0)
    axes[0].set_ylabel("good requests / s")
    share = axes[0].twinx()
    share.plot(seconds, [attained for _, _, attained in curve], color=_GOOD)
    share.set_ylim(0, 1.05)
    share.set_ylabel("attainment (line)")
    _draw_latency(axes[1], changed, "TTFT")
    _draw_latency(axes[2], changed, "TPOT")
    axes[2].set_xlabel("seconds since the load began, by arrival")
    for one in changed.made:
        for axis in axes:
            axis.axvspan(one.began_s, one.ended_s, color=_CHANGE, alpha=0.3, linewidth=0)
        axes[0].annotate(
            f"prelay {one.change}", (one.began_s, 0.02), xycoords=("data", "axes fraction"), rotation=90,
            fontsize="small", ha="right", va="bottom",
        )  # fmt: skip
    for axis in (*axes, share):
        axis.spines[["top"]].set_visible(False)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def _draw_latency(axis: Axes, changed: Changed, name: str) -> None:
    for row in changed.rows:
        seconds = row.ttft_s if name == "TTFT" else row.tpot_s
        limits = changed.slo.limits(row.prompt_tokens)
        limit = limits.ttft_s if name == "TTFT" else limits.tpot_s
        is_good = outcome_of(row, changed.slo) is Outcome.GOOD
        if seconds is not None:
            axis.plot(row.arrival_s, seconds / limit, ".", color=_GOOD if is_good else _BAD)
    axis.axhline(1.0, color=_BAD, linestyle="--", linewidth=1)
    axis.set_ylabel(f"{name} over its limit")
    axis.set_ylim(bottom=0)
