"""A router under thousands of streams, in a picture: its memory and the latency that it adds, over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

_MEMORY, _LATENCY = "#1f6f8b", "#c8553d"


def draw_streams(result: dict[str, Any], target: Path) -> None:
    """result: of `streams.measure`."""
    figure, (top, below) = pyplot.subplots(2, 1, figsize=(10, 6), sharex=True, layout="constrained")
    minutes = [look["at_s"] / 60 for look in result["looks"]]
    top.plot(minutes, [look["memory_mb"] for look in result["looks"]], color=_MEMORY, marker=".")
    top.set_ylabel("router's memory, MB")
    below.plot(minutes, [look["p99_ms"] for look in result["looks"]], color=_LATENCY, marker=".")
    below.set_ylabel("a token's way, p99 of 10 s, ms")
    below.set_xlabel("minutes")
    for axis in (top, below):
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{result['streams']:,} streams, {result['tokens_s']:,.0f} tokens/s, {result['left']:,} of "
        f"{result['left'] + result['answers']:,} answers left by their clients",
        fontsize="medium",
    )
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
