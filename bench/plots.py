"""Results as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from bench.profile import Profile, error_rows, kind_of

_OURS, _THEIRS, _LIMIT = "#1f6f8b", "#c8a45c", "#b5b5b5"


def draw_engine(result: dict[str, Any], target: Path) -> None:
    """tok/s of the engine, of transformers and at the limit, for every case; whiskers: least to greatest."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, phase, size, label in (
        (axes[0], "prefill", "tokens", "prompt tokens"),
        (axes[1], "decode", "batch", "sequences"),
    ):
        rows = result[phase]
        places = range(len(rows))
        limits = [row["tok_s"] / row["share_of_limit"] for row in rows]
        axis.bar(places, limits, width=0.8, color=_LIMIT, label="what the machine allows")
        speeds = [row["tok_s"] for row in rows]
        spreads = [row["tok_s_spread"] for row in rows]
        whiskers = [
            [speed - spread["min"] for speed, spread in zip(speeds, spreads, strict=True)],
            [spread["max"] - speed for speed, spread in zip(speeds, spreads, strict=True)],
        ]
        axis.bar(
            [p - 0.15 for p in places],
            speeds,
            width=0.3,
            color=_OURS,
            yerr=whiskers,
            capsize=3,
            label="prelay",
        )
        theirs = [row["transformers_tok_s"] or 0 for row in rows]
        if any(theirs):
            axis.bar([p + 0.15 for p in places], theirs, width=0.3, color=_THEIRS, label="transformers")
        for place, row in zip(places, rows, strict=True):
            axis.text(place - 0.15, row["tok_s"], f"{row['share_of_limit']:.0%}", ha="center", va="bottom")
        axis.set_xticks(list(places), [str(row[size]) for row in rows])
        axis.set_xlabel(label)
        axis.set_ylabel("tokens / s")
        axis.set_title(phase)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, loc="upper left")
    figure.suptitle(f"{result['shape']}, {result['dtype']}, {result['threads']} core(s)")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def draw_profile(profile: Profile, name: str, target: Path) -> None:
    """Predicted against measured times of the fitted and of the held-out steps, and the error beside it."""
    figure, axis = pyplot.subplots(figsize=(6, 5.5), layout="constrained")
    colors = {"prefill": "#1f6f8b", "decode": "#c8553d", "mixed": "#588157"}
    for samples, marker, alpha in ((profile.fitted, ".", 0.35), (profile.held_out, "D", 1.0)):
        for kind, color in colors.items():
            chosen = [sample for sample in samples if kind_of(sample.shape) == kind]
            axis.scatter(
                [sample.seconds * 1e3 for sample in chosen],
                [profile.model.step_s(sample.shape) * 1e3 for sample in chosen],
                color=color,
                marker=marker,
                alpha=alpha,
                s=24,
                label=f"{kind}, held out" if marker == "D" else f"{kind}, fitted",
            )
    times = [sample.seconds * 1e3 for sample in (*profile.fitted, *profile.held_out)]
    ends = [min(times), max(times)]
    axis.plot(ends, ends, color="#808080", linewidth=1)
    axis.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted, ms")
    _, _, median, p95 = error_rows(profile)[-1]
    axis.set_title(
        f"{name}\nheld-out error: median {median:.1%}, 95th percentile {p95:.1%}", fontsize="medium"
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize="small")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
