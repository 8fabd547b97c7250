"""`prelay bench router` as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

_COLORS = {"grpc": "#1f6f8b", "http": "#c8553d"}


def draw_router(result: dict[str, Any], target: Path) -> None:
    """Added latency and the router's CPU time per token over tokens/s, each point one measurement; decision
    times over workers in view."""
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, color in _COLORS.items():
        points = [point for climb in result["points"][name]["climbs"] for point in climb]
        points.sort(key=lambda point: point["tokens_s"])
        rates = [point["tokens_s"] for point in points]
        for axis, values in (
            (axes[0], [point["added_ms"]["p99"] for point in points]),
            (axes[1], [point["router_us_per_token"] for point in points]),
        ):
            axis.plot(rates, values, "o-", color=color, markersize=4, label=name)
    axes[0].set(yscale="log", xlabel="tokens / s", ylabel="ms", title="added latency, p99")
    axes[1].set(xlabel="tokens / s", ylabel="us", title="router's CPU time per token")
    workers = [int(number) for number in result["decision_ms"]]
    for key, label, style in (
        ("decision_p50", "decision, p50", "--"),
        ("decision_p99", "decision, p99", "-"),
        ("turn_p99", "whole turn, p99", ":"),
    ):
        values = [result["decision_ms"][str(number)][key]["median"] for number in workers]
        axes[2].plot(workers, values, style, marker="o", color=_COLORS["grpc"], label=label)
    axes[2].set(xscale="log", ylim=(0, None), xlabel="workers in view", ylabel="ms", title="decisions")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize="small")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
