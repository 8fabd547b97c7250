"""What `prelay bench serve` measured, in pictures: attainment, distributions, stages, and single requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from bench.load.serve import Measured, Run
from cluster.workload.jobs import Row
from cluster.workload.judge import Outcome, judge, outcome_of
from cluster.workload.slo import Limit

_GOOD, _LATE, _LIMIT, _WAIT = "#1f6f8b", "#c8553d", "#c8553d", "#c9d6db"
_STAGES = (
    "#d9d9d9", "#c8a45c", "#1f6f8b", "#588157", "#8d6a9f", "#e3b7a0", "#9cc5d3", "#c8553d", "#606060",
)  # fmt: skip
_MAX_BARS = 150
_TARGET = 0.9


def draw_serve(measured: Measured, title: str, target: Path) -> None:
    """Left: attainment over rate, and stages; middle: TTFT and TPOT; right: the requests of one run."""
    figure = pyplot.figure(figsize=(17, 8.5), layout="constrained")
    places = figure.subplot_mosaic([["curve", "ttft", "time"], ["stages", "tpot", "time"]])
    _draw_curve(places["curve"], measured)
    _draw_stages(places["stages"], measured)
    _draw_distribution(places["ttft"], measured, "TTFT", measured.slo.ttft, lambda row: row.ttft_s)
    _draw_distribution(places["tpot"], measured, "TPOT", measured.slo.tpot, lambda row: row.tpot_s)
    _draw_timeline(places["time"], measured)
    for axis in places.values():
        axis.spines[["top", "right"]].set_visible(False)
    limits = f"TTFT <= {measured.slo.ttft}, TPOT <= {measured.slo.tpot}"
    figure.suptitle(f"{measured.info.model}, {limits}\n{title}", fontsize="medium")
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def _draw_curve(axis: Axes, measured: Measured) -> None:
    """Points: all seeds together; whiskers: the seeds with the least and the greatest."""
    rates = measured.plan.rates
    found = [measured.judgement(rate) for rate in rates]
    offered = [
        point.requests / point.duration_s if rate is None else rate
        for rate, point in zip(rates, found, strict=True)
    ]
    attained = [point.attainment for point in found]
    seeds = [
        [judge(run.judged, measured.slo, run.duration_s).attainment for run in measured.of(rate)]
        for rate in rates
    ]
    # Seeds have different numbers of requests: the whole lies between them, but for rounding.
    whiskers = [
        [max(0.0, whole - min(each)) for whole, each in zip(attained, seeds, strict=True)],
        [max(0.0, max(each) - whole) for whole, each in zip(attained, seeds, strict=True)],
    ]
    axis.errorbar(offered, attained, yerr=whiskers, color=_GOOD, marker="o", capsize=3)
    axis.axhline(_TARGET, color=_LIMIT, linestyle="--", linewidth=1)
    for headline in measured.headlines():
        crossing = headline.pooled
        if crossing.target == _TARGET and not crossing.bound:
            axis.plot([headline.least.rate, headline.greatest.rate], [_TARGET] * 2, color=_LIMIT, linewidth=4)
            axis.plot(crossing.rate, _TARGET, "o", color=_LIMIT)
        if crossing.target == _TARGET:
            axis.set_title(
                f"{_TARGET:.0%} up to {crossing} req/s ({headline.least} - {headline.greatest} by seed)",
                fontsize="medium",
            )
    axis.set(xlabel="offered, requests / s", ylabel="attainment (both limits)", ylim=(0, 1.03))
    axis.set_xlim(left=0)


def _draw_stages(axis: Axes, measured: Measured) -> None:
    """Means of complete answers: by the server's account, or what the client sees where there is none."""
    found = [measured.judgement(rate) for rate in measured.plan.rates]
    stages = [point.stages for point in found]
    told = any(stages)
    if not told:
        stages = [
            _seen_stages([row for run in measured.of(rate) for row in run.judged])
            for rate in measured.plan.rates
        ]
    bottoms = np.zeros(len(stages))
    names = [name for name in dict.fromkeys(name for each in stages for name in each)]
    for name, color in zip(names, _STAGES, strict=False):
        heights = np.array([each.get(name, 0.0) for each in stages])
        if heights.max() > 0:
            axis.bar(range(len(stages)), heights, bottom=bottoms, width=0.7, color=color, label=name)
        bottoms += heights
    axis.set_xticks(range(len(stages)), [_name(rate) for rate in measured.plan.rates])
    axis.set(xlabel="offered, requests / s", ylabel="mean seconds of an answer")
    axis.set_title("where the time goes" + ("" if told else ", as the client sees it"), fontsize="medium")
    axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)


def _seen_stages(rows: Sequence[Row]) -> dict[str, float]:
    times = [(row.first_s, row.last_s) for row in rows if row.first_s is not None and row.last_s is not None]
    if not times:
        return {}
    firsts = sum(first for first, _ in times) / len(times)
    return {"first token": firsts, "decode": sum(last for _, last in times) / len(times) - firsts}


def _draw_distribution(
    axis: Axes, measured: Measured, name: str, limit: Limit, value: Callable[[Row], float | None]
) -> None:
    """A line for each rate; of all requests that were sent, so it ends where those without a token begin."""
    colors = pyplot.get_cmap("viridis")(np.linspace(0.15, 0.85, len(measured.plan.rates)))
    for rate, color in zip(measured.plan.rates, colors, strict=True):
        rows = [row for run in measured.of(rate) for row in run.judged]
        values = sorted(
            _measure(measured, row, name, found) for row in rows if (found := value(row)) is not None
        )
        shares = np.arange(1, len(values) + 1) / max(1, len(rows))
        axis.step(values, shares, where="post", color=color, label=_name(rate))
    axis.axvline(limit.value, color=_LIMIT, linestyle="--", linewidth=1)
    axis.text(limit.value, 0.02, f" {limit}", color=_LIMIT, fontsize="small")
    unit = "times that of the request alone" if limit.relative else "s"
    axis.set(xlabel=f"{name}, {unit}", ylabel="share of all that were sent", ylim=(0, 1.03), xscale="log")
    axis.legend(frameon=False, fontsize="small", title="req/s")


def _measure(measured: Measured, row: Row, name: str, seconds: float) -> float:
    """Seconds, or how many times the request's own time alone if the limit is such a multiple."""
    limit = measured.slo.ttft if name == "TTFT" else measured.slo.tpot
    if not limit.relative:
        return seconds
    limits = measured.slo.limits(row.prompt_tokens)
    return seconds / (limits.ttft_s if name == "TTFT" else limits.tpot_s) * limit.value


def _draw_timeline(axis: Axes, measured: Measured) -> None:
    """Bars from sending to the last token, the part before the first token pale."""
    run = _typical(measured)
    rows = run.judged[:_MAX_BARS]
    for place, row in enumerate(rows):
        color = _GOOD if outcome_of(row, measured.slo) is Outcome.GOOD else _LATE
        if row.first_s is None or row.last_s is None:
            axis.plot(row.sent_s, place, "x", color=color, markersize=4)
            continue
        axis.barh(place, row.first_s, left=row.sent_s, height=0.8, color=_WAIT)
        axis.barh(place, row.last_s - row.first_s, left=row.sent_s + row.first_s, height=0.8, color=color)
    axis.invert_yaxis()
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="s since the start", ylabel="request, in order of arrival")
    for label, color in (
        ("before the first token", _WAIT),
        ("answer of a good request", _GOOD),
        ("of another", _LATE),
    ):
        axis.barh(0, 0, color=color, label=label)
    axis.plot([], [], "x", color=_LATE, label="without a token")
    axis.legend(frameon=False, fontsize="small", loc="lower left")
    axis.set_title(
        f"{_name(run.rate)} req/s, seed {run.seed + 1}, first {len(rows)} requests", fontsize="medium"
    )


def _typical(measured: Measured) -> Run:
    """What to look at: the first seed of the highest rate that attains the target, or of the lowest one."""
    enough = [rate for rate in measured.plan.rates if measured.judgement(rate).attainment >= _TARGET]
    return measured.of(enough[-1] if enough else measured.plan.rates[0])[0]


def _name(rate: float | None) -> str:
    return "trace" if rate is None else f"{rate:g}"
