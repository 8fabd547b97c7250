"""What came of a search: a table, why, JSON, pictures, and the configuration of `prelay serve`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from bench.plan.options import Asked
from cluster.planner.cheapest import Enough
from cluster.planner.goodput import Goodput
from cluster.planner.live import difference
from cluster.planner.plans import Plan, serve_config
from cluster.planner.question import Question
from cluster.planner.search import Answer, Finalist, apart, phases_of
from cluster.planner.sensitivity import Sensitivity
from router.pool_view import Role

_NUM_STRONG = 3
UNITS = {"device": "device", "cost": "currency unit an hour", "watt": "watt"}


@dataclass(frozen=True, slots=True)
class Found:
    """enough: what serves for_rate, the cheapest first. changes: None where nobody asked what if."""

    answer: Answer
    for_rate: float | None
    enough: Sequence[Enough]
    changes: Sensitivity | None

    @property
    def chosen(self) -> Plan:
        """What to run."""
        return self.enough[0].plan if self.enough else self.answer.finalists[0].plan


def to_json(asked: Asked, found: Found, wall_s: float) -> dict[str, Any]:
    """What --json prints. goodput_per_device, ci: requests/s; ci spans the seeds."""
    question, answer = asked.question, found.answer
    return {
        "target": question.target,
        "objective": question.objective.value,
        "is_measured": answer.finalists[0].plan.pools[0].kind.is_measured,
        "plans": [_plan_json(one, answer) for one in answer.finalists],
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
        **({} if found.for_rate is None else {"for_rate": _enough_json(found)}),
        **({} if found.changes is None else {"what_if": _changes_json(found.changes)}),
        **({} if asked.live is None else {"live": _live_json(asked, found)}),
        "wall_s": wall_s,
    }


def _enough_json(found: Found) -> dict[str, Any]:
    return {
        "rate": found.for_rate,
        "plans": [
            {
                **one.plan.to_json(),
                "devices": one.plan.devices,
                "cost": one.cost,
                "attainment": one.attainment,
            }
            for one in found.enough
        ],
    }


def _changes_json(changes: Sensitivity) -> dict[str, Any]:
    return {
        "attainment_at_twice_the_rate": changes.at_twice,
        "changes": [
            {
                "what": one.what,
                "goodput": one.winner_before.rate,
                "of_before": one.of_before,
                "best": one.finalists[0].plan.to_json(),
                "best_goodput": one.finalists[0].rate,
            }
            for one in changes.changed
        ],
    }


def _live_json(asked: Asked, found: Found) -> dict[str, Any]:
    assert asked.live is not None
    seen = asked.live.workload
    return {
        "rate": seen.rate,
        "hit_share": seen.hit_share,
        "drifts": [{"trait": one.trait, "before": one.before, "now": one.now} for one in seen.drifts],
        "now": None if asked.now is None else asked.now.to_json(),
        "changes": [] if asked.now is None else difference(asked.now, found.chosen),
    }


def lines(asked: Asked, found: Found) -> Iterator[str]:
    """What else was asked, in words."""
    if asked.live is not None:
        yield from asked.live.said()
    if asked.now is not None:
        yield from _of_now(asked, found)
    for number, one in enumerate(found.enough):
        unit = _unit(asked.question)
        what = f"{one.plan}: {one.cost:g} {unit}s, {one.attainment:.1%} good"
        yield f"cheapest for {found.for_rate:g} requests/s: {what}" if number == 0 else f"  next: {what}"
    if found.changes is not None:
        best = found.answer.finalists[0]
        for change in found.changes.changed:
            other = change.finalists[0]
            stays = other.plan == best.plan
            serves = f"{change.of_before:.0%} of that ({change.winner_before.rate:.3g} requests/s)"
            better = "" if stays else f"; {other.plan} would be better ({other.rate:.3g})"
            yield f"{change.what}: it would serve {serves}{better}"
        yield (
            f"at twice its rate {found.changes.at_twice:.0%} would be good; twice the devices "
            f"({2 * best.plan.devices}) serve it"
        )


def _of_now(asked: Asked, found: Found) -> Iterator[str]:
    assert asked.now is not None
    assert asked.live is not None
    now = next(one for one in found.answer.finalists if one.plan == asked.now)
    best, seen = found.answer.finalists[0], asked.live.workload.rate
    yield f"now: {now.plan}, good for {now.rate:.3g} requests/s"
    if max(now.rate, best.rate) < seen:
        yield f"no plan for these devices serves the {seen:.3g} requests/s that came lately: add devices"
    if found.chosen == now.plan:
        yield "it is the best of these plans: change nothing"
        return
    if found.enough:
        yield f"planned for {found.for_rate:g} requests/s: {found.chosen}"
    else:
        gain = f"{best.rate / now.rate - 1:+.0%}" if now.rate > 0 else "up from none"
        yield f"planned: {best.plan}, good for {best.rate:.3g} ({gain})"
    for line in difference(asked.now, found.chosen):
        yield f"  {line}"


def _plan_json(one: Finalist, answer: Answer) -> dict[str, Any]:
    per_device = one.times / one.plan.devices
    return {
        **one.plan.to_json(),
        "devices": one.plan.devices,
        "goodput": one.rate,
        "goodput_per_device": one.goodput.rate * per_device,
        "ci": [one.goodput.least * per_device, one.goodput.greatest * per_device],
        "phases_apart_per_device": apart(one.plan, answer.phases) / one.plan.devices,
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
    rates: dict[str, float] = {}
    for pool in best.plan.pools:
        found = phases_of(pool.kind, answer.phases)
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
            "(DistServe, Algorithm 2); `prelay serve` does not see to that yet, so place them so yourself"
        )
    yield from _where_time_goes(question, best)
    if len(answer.finalists) > 1:
        second = answer.finalists[1]
        least = best.value * best.goodput.least / best.goodput.rate
        close = " (closer than trials can tell)" if least <= second.value else ""
        yield f"the next best, {second.plan}, gives {1 - second.value / best.value:.0%} less{close}"
    if not best.plan.pools[0].kind.is_measured:
        yield "step times were reckoned from data sheets, not measured: measure before you buy"


def _where_time_goes(question: Question, best: Finalist) -> Iterator[str]:
    """Of a request on the average, at the rate that the plan serves."""
    if question.by_distserve:
        return
    rows = question.rows(best.unit, best.goodput.rate, question.seeds[0])
    stages = Counter[str]()
    for row in rows:
        stages.update(row.stages)
    total = sum(stages.values())
    if total > 0:
        parts = (
            f"{name.replace('_', ' ')} {seconds / len(rows):.3g} s ({seconds / total:.0%})"
            for name, seconds in stages.most_common()
            if seconds >= 0.005 * total
        )
        yield f"where the time of a request goes at that rate: {', '.join(parts)}"


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


def write_plan(question: Question, plan: Plan, model: Mapping[str, Any], target: Path) -> None:
    """What `prelay serve` takes. model: what is known of that section; without a path it is left to be filled
    in."""
    limits = question.slo.limits(round(question.mean_prompt))
    config = serve_config(plan, model, {"ttft_s": limits.ttft_s, "tpot_s": limits.tpot_s})
    hint = "" if "path" in model else "# Give the checkpoint: prelay serve plan.yaml --model DIR\n"
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
