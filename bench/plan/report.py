"""What came of a search: a table, why, JSON, pictures, and the configuration of `prelay serve`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from cluster.planner.goodput import Goodput
from cluster.planner.plans import Plan, serve_config
from cluster.planner.question import Question
from cluster.planner.search import Answer, Finalist
from router.pool_view import Role

_NUM_STRONG = 3
UNITS = {"device": "device", "cost": "currency unit an hour", "watt": "watt"}


def to_json(question: Question, answer: Answer, wall_s: float) -> dict[str, Any]:
    """What --json prints. goodput_per_device, ci: requests/s; ci spans the seeds."""
    return {
        "target": question.target,
        "objective": question.objective.value,
        "is_measured": answer.finalists[0].plan.pools[0].kind.is_measured,
        "plans": [_plan_json(one) for one in answer.finalists],
        "phases": [
            {
                "gpu": one.kind.gpu.name,
                "tp": one.kind.tp,
                "pp": one.kind.pp,
                "kv_tokens": one.kind.kv_tokens,
                "prefill_rate": one.prefill.rate,
                "decode_rate": one.decode.rate,
            }
            for one in answer.phases
        ],
        "verdict": verdict(question, answer),
        "wall_s": wall_s,
    }


def _plan_json(one: Finalist) -> dict[str, Any]:
    per_device = one.times / one.plan.devices
    return {
        **one.plan.to_json(),
        "devices": one.plan.devices,
        "goodput": one.rate,
        "goodput_per_device": one.goodput.rate * per_device,
        "ci": [one.goodput.least * per_device, one.goodput.greatest * per_device],
        "value": one.value,
    }


def verdict(question: Question, answer: Answer) -> str:
    """One sentence: what to run, and by how much it wins."""
    best = answer.finalists[0]
    other = next(
        (one for one in answer.finalists if one.plan.is_disaggregated != best.plan.is_disaggregated), None
    )
    what = f"run {best.plan}: {best.rate:.3g} requests/s, {best.value:.3g} per {_unit(question)}"
    if other is None:
        return what
    than = f"than {other.plan} ({other.value:.3g})"
    by = f"{best.value / other.value:.2f} times more {than}" if other.value > 0 else f"more {than}"
    if best.plan.is_disaggregated:
        return f"{what}, {by}"
    return f"do not disaggregate: {what}, {by}"


def explanation(question: Question, answer: Answer) -> Iterator[str]:
    """Why the winner won: which phase binds, and where it is close."""
    best = answer.finalists[0]
    of = {one.kind: one for one in answer.phases}
    rates: dict[str, float] = {}
    for pool in best.plan.pools:
        found = of[pool.kind]
        if pool.role is not Role.DECODE:
            rates["reading"] = rates.get("reading", 0.0) + pool.replicas * found.prefill.rate
        if pool.role is not Role.PREFILL:
            rates["writing"] = rates.get("writing", 0.0) + pool.replicas * found.decode.rate
    for name, rate in rates.items():
        yield f"{name} alone would keep its limit up to {rate:.3g} requests/s"
    if best.plan.is_disaggregated and len(rates) == 2:
        binds = min(rates, key=lambda name: rates[name])
        by = "by DistServe's rules" if question.by_distserve else "with the router, memory and transfer"
        yield f"{binds} binds; both together reach {best.rate:.3g}, {by}"
    if answer.is_near:
        yield (
            "links between nodes are slow for this model's KV: only workers that share nodes were paired "
            "(DistServe, Algorithm 2)"
        )
    if len(answer.finalists) > 1:
        second = answer.finalists[1]
        least = best.value * best.goodput.least / best.goodput.rate
        close = " (closer than trials can tell)" if least <= second.value else ""
        yield f"the next best, {second.plan}, gives {1 - second.value / best.value:.0%} less{close}"
    if not best.plan.pools[0].kind.is_measured:
        yield "step times were reckoned from data sheets, not measured: measure before you buy"


def table(question: Question, answer: Answer) -> Table:
    """The finalists, the best first."""
    limits = question.slo.limits(round(question.mean_prompt))
    found = Table(
        "plan", "devices", "requests/s", f"per {_unit(question)}", "seeds", "part simulated",
        title=f"{question.target:.0%} within TTFT {limits.ttft_s:.3g} s and TPOT {limits.tpot_s:.3g} s",
    )  # fmt: skip
    for one in answer.finalists:
        spread = f"{one.goodput.least * one.times:.3g} - {one.goodput.greatest * one.times:.3g}"
        found.add_row(
            str(one.plan), str(one.plan.devices), f"{one.rate:.3g}", f"{one.value:.3g}", spread,
            f"1 of {one.times}",
        )  # fmt: skip
    found.caption = verdict(question, answer)
    return found


def write_plan(question: Question, plan: Plan, model: str | None, target: Path) -> None:
    """What `prelay serve` takes. model: a checkpoint's directory; None leaves it to be filled in."""
    limits = question.slo.limits(round(question.mean_prompt))
    config = serve_config(plan, model, {"ttft_s": limits.ttft_s, "tpot_s": limits.tpot_s})
    hint = "" if model else "# Give the checkpoint: prelay serve plan.yaml --model DIR\n"
    target.write_text(f"# {plan}\n{hint}{yaml.safe_dump(config, sort_keys=False)}")


def draw(question: Question, answer: Answer, target: Path) -> None:
    """Left: attainment over the rate of the whole plan. Right: what plans serve over what they hold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 5.5), layout="constrained")
    for number, one in enumerate(answer.finalists):
        rates, shares = _curve(one.goodput, one.times)
        alpha = 1.0 if number < _NUM_STRONG else 0.5
        left.plot(rates, shares, marker="o", markersize=3, label=f"{number + 1}  {one.plan}", alpha=alpha)
        right.scatter(one.plan.cost(question.objective), one.rate, s=40)
        right.annotate(f"  {number + 1}", (one.plan.cost(question.objective), one.rate), fontsize="small")
    left.axhline(question.target, color="#c8553d", linestyle="--", linewidth=1)
    left.set(xlabel="offered, requests / s", ylabel="attainment (both limits)", ylim=(0, 1.03))
    left.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    front = _front([(one.plan.cost(question.objective), one.rate) for one in answer.finalists])
    right.step(*zip(*front, strict=True), where="post", color="#1f6f8b", linewidth=1)
    right.set(xlabel=f"{_unit(question)}s", ylabel="requests / s within both limits", ylim=(0, None))
    right.set_xlim(left=0)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(verdict(question, answer), fontsize="medium", wrap=True)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def _curve(goodput: Goodput, times: int) -> tuple[list[float], list[float]]:
    rates = sorted(goodput.points)
    shares = [goodput.points[rate][0] / max(1, goodput.points[rate][1]) for rate in rates]
    return [rate * times for rate in rates], shares


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that nothing cheaper surpasses."""
    found: list[tuple[float, float]] = []
    for cost, rate in sorted(points):
        if not found or rate > found[-1][1]:
            found.append((cost, rate))
    return found


def _unit(question: Question) -> str:
    return UNITS[question.objective.value]
