"""Results as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter, NullLocator

from bench.profile import Profile, error_rows

_OURS, _THEIRS, _LIMIT = "#1f6f8b", "#c8a45c", "#b5b5b5"
_SIZES = ("#9cc5d3", "#4f97b0", "#1f6f8b", "#123f50")
_LIMITS = {"ipc": "memcpy"}


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
            chosen = [sample for sample in samples if sample.shape.phase == kind]
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


def draw_transfer(result: dict[str, Any], target: Path) -> None:
    """Left: GB/s of each backend as a share of the limit, and the goal. Then for each backend the exposed
    time by prompt length, with an idle and with a busy decode worker; whiskers: least to greatest."""
    names = list(dict.fromkeys(row["name"] for row in result["backends"]))
    figure, axes = pyplot.subplots(
        2, 1 + len(names), figsize=(4.5 * (1 + len(names)), 7.5), layout="constrained", squeeze=False
    )
    for axis, key, title in (
        (axes[0][0], None, "blocks that follow each other"),
        (axes[1][0], "unequal", "from unequal tensor parallelism"),
    ):
        _draw_shares(axis, result["backends"], names, key)
        axis.set_title(title, fontsize="medium")
    for column, name in enumerate(names, 1):
        rows = [row for row in result["exposed"] if row["backend"] == name]
        lengths = [row["prompt_tokens"] for row in rows]
        _draw_exposed(axes[0][column], lengths, rows)
        axes[0][column].set_title(f"{name}, idle decode worker", fontsize="medium")
        busy = [row["busy"] for row in rows]
        _draw_exposed(axes[1][column], lengths, busy)
        axes[1][column].set_title(f"{name}, {busy[0]['batch']} sequences decoding", fontsize="medium")
    axes[0][0].legend(frameon=False, fontsize="small")
    axes[0][1].legend(frameon=False, fontsize="small")
    figure.suptitle(f"{result['shape']}, {result['dtype']}, a core for each worker")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def _draw_shares(axis: Axes, rows: list[dict[str, Any]], names: list[str], key: str | None) -> None:
    """key: of the case in a row; None for the row itself."""
    sizes = list(dict.fromkeys(row["mb"] for row in rows))
    width = 0.8 / len(sizes)
    for at, size in enumerate(sizes):
        for place, name in enumerate(names):
            row = next(row for row in rows if (row["name"], row["mb"]) == (name, size))
            case = row if key is None else row[key]
            share, spread = case["share_of_limit"], case["share_spread"]
            x = place - 0.4 + width * (at + 0.5)
            axis.bar(
                x,
                share,
                width=width * 0.9,
                color=_SIZES[at % len(_SIZES)],
                label=f"{size} MiB" if place == 0 else None,
                yerr=[[share - spread["min"]], [spread["max"] - share]],
                capsize=2,
                error_kw={"linewidth": 0.8},
            )
            axis.text(x, 0.02, f"{case['gbps']:.1f}", ha="center", va="bottom", fontsize="x-small")
    for place, name in enumerate(names):
        goal = 0.8 if name == "ipc" else 0.7
        axis.plot([place - 0.45, place + 0.45], [goal, goal], color="#c8553d", linestyle="--", linewidth=1)
    axis.set_xticks(range(len(names)), [f"{name}\n(of {_LIMITS.get(name, 'TCP')})" for name in names])
    axis.set_ylabel("share of what the machine allows\n(numbers: GB/s; dashed: goal)")
    axis.spines[["top", "right"]].set_visible(False)


def _draw_exposed(axis: Axes, lengths: list[int], rows: list[dict[str, Any]]) -> None:
    for mode, color, label in (
        ("overlap", _OURS, "offered while it is computed"),
        ("no_overlap", _THEIRS, "offered at the end of prefill"),
    ):
        times = [row[f"{mode}_ms"] for row in rows]
        spreads = [row[f"{mode}_spread"] for row in rows]
        whiskers = [
            [time - spread["min"] for time, spread in zip(times, spreads, strict=True)],
            [spread["max"] - time for time, spread in zip(times, spreads, strict=True)],
        ]
        axis.errorbar(lengths, times, yerr=whiskers, color=color, marker="o", capsize=3, label=label)
    goals = [row["goal_ms"] for row in rows]
    axis.plot(lengths, goals, color="#c8553d", linestyle="--", label="goal: a decode step + 5 % of prefill")
    axis.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="exposed, ms")
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.xaxis.set_minor_locator(NullLocator())
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axis.spines[["top", "right"]].set_visible(False)
