"""The search for a plan.

1. Phases apart (Zhong et al., OSDI 2024, Algorithm 1): for each kind of worker, the highest rate at which one
   that only reads keeps TTFT limits, and one that only writes keeps TPOT limits, both at the target. Where
   links between nodes are slow (Algorithm 2), only kinds that share nodes are paired: same stages, and both
   phases' ranks of a stage on one node.
2. Finalists: the kinds that do best for what they cost, of each phase, with so many replicas that neither
   phase waits for the other; the same kinds as mixed workers; and half of each. On hardware of several kinds
   each phase has its pick of them, as far as there are enough.
3. Together: each finalist is simulated with the router, memory and transfer, and its own highest rate is
   found, first at a glance, and of the best once more with all seeds. The best for what it costs is the plan;
   that may be one that does not disaggregate.

What is simulated of a finalist is its smallest part with the same proportions: a cluster of several such
parts serves at least as many times as much.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from cluster.planner.errors import NoPlanError
from cluster.planner.goodput import Goodput, highest_rate
from cluster.planner.kinds import Kind
from cluster.planner.plans import Plan, Pool
from cluster.planner.question import Question
from cluster.simulator.errors import SimulationError
from router.pool_view import Role

_BEST = 3
_BEST_PAIRS, _BEST_MIXED = 5, 2
_COARSE = 0.1
_AT_A_GLANCE, _THOROUGH = 0.15, 3
"""How far apart rates may be at first, and how many plans are then looked at more closely."""
_MOST_UNIT = 5
_UNITS = [
    (readers, writers)
    for readers in range(1, _MOST_UNIT)
    for writers in range(1, _MOST_UNIT + 1 - readers)
    if math.gcd(readers, writers) == 1
]
"""Of how many readers and writers plans are multiples: few, so that one can be simulated long enough."""
_MOST_ALONE = 50
"""Times half of what a reader serves one by one: who serves more in a phase is never what is missing."""
_SLOW_SHARE = 0.1
"""Links are slow if the KV of a usual prompt takes more than this share of its TTFT limit between nodes."""

Show = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class Phases:
    """What a worker of one kind serves alone: the rates at which it keeps TTFT limits as a reader, and TPOT
    limits as a writer."""

    kind: Kind
    prefill: Goodput
    decode: Goodput


@dataclass(frozen=True, slots=True)
class Finalist:
    """unit: what was simulated, times: how many of it the plan is. goodput: of the unit. value: of the plan,
    for what it costs."""

    plan: Plan
    unit: Plan
    times: int
    goodput: Goodput
    value: float

    @property
    def rate(self) -> float:
        """Requests/s of the whole plan."""
        return self.goodput.rate * self.times


@dataclass(frozen=True, slots=True)
class Answer:
    """finalists: the best first. phases: of all kinds. is_near: whether links are so slow that phases share
    nodes."""

    finalists: Sequence[Finalist]
    phases: Sequence[Phases]
    is_near: bool


def search(
    question: Question, kinds: Sequence[Kind], executor: Executor, show: Show, also: Sequence[Plan] = ()
) -> Answer:
    """also: plans that are judged, too, whatever the phases apart say of them. Raises NoPlanError."""
    _check_limits(question, kinds)
    show(0.0, "each phase apart")
    phases: list[Phases] = []
    for number, found in enumerate(executor.map(partial(measure_phases, question), kinds)):
        phases.append(found)
        show(0.3 * (number + 1) / len(kinds), f"each phase apart: {found.kind}")
    is_near = _links_are_slow(question, kinds)
    plans = list(dict.fromkeys([*also, *finalists(question, phases, is_near=is_near)]))
    if not plans:
        raise NoPlanError(_why_none(question, phases))
    best = _judged(question, plans, phases, also, executor, show)
    if best[0].goodput.is_none:
        raise NoPlanError(_why_none(question, phases))
    return Answer(best, phases, is_near)


def _judged(
    question: Question,
    plans: Sequence[Plan],
    phases: Sequence[Phases],
    also: Sequence[Plan],
    executor: Executor,
    show: Show,
) -> list[Finalist]:
    """All at a glance, then the best of them thoroughly, until the best are all of these; the best first."""
    found: dict[Plan, Finalist] = {}
    glance = partial(measure_plan, question.at_a_glance, tolerance=_AT_A_GLANCE)
    for finalist in executor.map(glance, plans, [guess(plan, phases) for plan in plans]):
        found[finalist.plan] = finalist
        show(0.3 + 0.3 * len(found) / len(plans), f"together: {finalist.plan}")
    thorough: set[Plan] = set()
    while todo := [plan for plan in _worth_it(list(found.values()), also) if plan not in thorough]:
        rates = [max(found[plan].rate, 1e-3) for plan in todo]
        for finalist in executor.map(partial(measure_plan, question), todo, rates):
            found[finalist.plan] = finalist
            thorough.add(finalist.plan)
            show(0.6 + 0.4 * len(thorough) / (len(thorough) + 1), f"once more: {finalist.plan}")
    return sorted(found.values(), key=lambda one: -one.value)


def _worth_it(finalists: Sequence[Finalist], also: Sequence[Plan]) -> list[Plan]:
    """The best, the best of the other way (disaggregated or not), and those that somebody has asked for."""
    best = sorted(finalists, key=lambda one: -one.value)
    chosen = [one.plan for one in best[:_THOROUGH]]
    other = (one.plan for one in best if one.plan.is_disaggregated != best[0].plan.is_disaggregated)
    return list(dict.fromkeys([*chosen, *itertools.islice(other, 1), *also]))


def measure_phases(question: Question, kind: Kind) -> Phases:
    """Of one kind."""

    def found(trial: Callable[[Kind, float, int], tuple[int, int]], most: float) -> Goodput:
        seeds = question.seeds[:1]
        return highest_rate(partial(trial, kind), question.target, start, seeds, _COARSE, most)

    start = 0.5 / question.idle(kind)[0]
    return Phases(
        kind,
        found(question.prefill_alone, _MOST_ALONE * start),
        found(question.decode_alone, _MOST_ALONE * start),
    )


def measure_plan(question: Question, plan: Plan, guess: float, tolerance: float = 0.05) -> Finalist:
    """guess: requests/s of the whole plan, to begin with."""
    unit, times = plan.unit()
    try:
        goodput = highest_rate(
            partial(question.joint, unit),
            question.target,
            max(guess / times, 1e-3),
            question.seeds,
            tolerance,
        )
    except SimulationError as error:
        raise NoPlanError(f"{plan}: {error}") from error
    value = goodput.rate * times / question.cost(plan)
    return Finalist(plan, unit, times, goodput, value)


def finalists(question: Question, phases: Sequence[Phases], *, is_near: bool) -> list[Plan]:
    """Each once."""
    objective = question.objective
    both = _best(phases, lambda one: _both(one) / objective.of(one.kind))[:_BEST_MIXED]
    plans = _pairs(question, phases, is_near=is_near)
    for number, one in enumerate(both):
        count = _available(question, one.kind) // one.kind.devices
        plans.append(Plan((Pool(Role.MIXED, one.kind, count),)))
        if count >= 2 and number == 0 and not question.by_distserve:
            half = (Pool(Role.PREFILL, one.kind, count // 2), Pool(Role.MIXED, one.kind, count // 2))
            plans.append(Plan(half))
    return list(dict.fromkeys(plans))


def _pairs(question: Question, phases: Sequence[Phases], *, is_near: bool) -> list[Plan]:
    """Disaggregated plans, those first that promise most by the phases apart."""
    objective = question.objective
    if is_near:
        usable = [one for one in phases if one.prefill.rate > 0 and one.decode.rate > 0]
        pairs = [pair for pair in itertools.product(usable, usable) if _share_nodes(question, *pair)]
    else:
        readers = _best(phases, lambda one: one.prefill.rate / objective.of(one.kind))
        writers = _best(phases, lambda one: one.decode.rate / objective.of(one.kind))
        pairs = list(itertools.product(readers, writers))
    found: list[tuple[float, Plan]] = []
    for reader, writer in pairs:
        replicas = matched(question, reader, writer, is_near=is_near)
        if replicas is not None:
            pools = (
                Pool(Role.PREFILL, reader.kind, replicas[0]),
                Pool(Role.DECODE, writer.kind, replicas[1]),
            )
            plan = Plan(pools, is_near)
            rate = min(replicas[0] * reader.prefill.rate, replicas[1] * writer.decode.rate)
            found.append((rate / question.cost(plan), plan))
    return [plan for _, plan in sorted(found, key=lambda one: -one[0])[:_BEST_PAIRS]]


def matched(
    question: Question, reader: Phases, writer: Phases, *, is_near: bool = False
) -> tuple[int, int] | None:
    """How many of each serve most for what they cost, neither waiting for the other: a small unit, as often
    as there are devices for it; None if there is no room for one of each."""
    best: tuple[float, float, tuple[int, int]] | None = None
    for readers, writers in _UNITS:
        if is_near and readers != writers:
            continue  # a unit is a pair
        times = (
            most_near(question, reader.kind, writer.kind)
            if is_near
            else _most_times(question, reader.kind, readers, writer.kind, writers)
        )
        if times == 0:
            continue
        rate = min(readers * reader.prefill.rate, writers * writer.decode.rate)
        objective = question.objective
        cost = readers * objective.of(reader.kind) + writers * objective.of(writer.kind)
        value = times * rate if question.is_owned else rate / cost
        found = (round(value, 6), times * rate, (times * readers, times * writers))
        if best is None or found > best:
            best = found
    return None if best is None or best[1] <= 0 else best[2]


def _most_times(question: Question, reader: Kind, readers: int, writer: Kind, writers: int) -> int:
    """How many times there are devices for so many of each."""
    if reader.gpu == writer.gpu:
        return _available(question, reader) // (readers * reader.devices + writers * writer.devices)
    return min(
        _available(question, reader) // (readers * reader.devices),
        _available(question, writer) // (writers * writer.devices),
    )


def most_near(question: Question, reader: Kind, writer: Kind) -> int:
    """How many pairs there is room for, whose stages share a node each."""
    per_node, count = question.hardware.per_node, _available(question, reader)
    stage = reader.tp + writer.tp
    stages = count // per_node * (per_node // stage) + count % per_node // stage
    return stages // reader.pp


def _available(question: Question, kind: Kind) -> int:
    return sum(one.count for one in question.hardware.devices if one.gpu == kind.gpu)


def _best(phases: Sequence[Phases], value: Callable[[Phases], float]) -> list[Phases]:
    useful = [one for one in phases if value(one) > 0]
    return sorted(useful, key=lambda one: -value(one))[:_BEST]


def _both(one: Phases) -> float:
    """What a worker serves that does both, one after the other."""
    if one.prefill.rate <= 0 or one.decode.rate <= 0:
        return 0.0
    return 1 / (1 / one.prefill.rate + 1 / one.decode.rate)


def guess(plan: Plan, phases: Sequence[Phases]) -> float:
    """Requests/s, from the phases apart, and somewhat less."""
    return max(1e-3, 0.7 * apart(plan, phases))


def apart(plan: Plan, phases: Sequence[Phases]) -> float:
    """Requests/s, if each phase did what it does alone (what Algorithms 1 and 2 maximise)."""
    rates = []
    for pool in plan.pools:
        one = phases_of(pool.kind, phases)
        rate = {Role.PREFILL: one.prefill.rate, Role.DECODE: one.decode.rate, Role.MIXED: _both(one)}
        rates.append(rate[pool.role] * pool.replicas)
    return min(rates)


def phases_of(kind: Kind, phases: Sequence[Phases]) -> Phases:
    """Of that kind, or of one that is split alike: what runs may have its room and limits of its own."""
    alike = [
        one for one in phases if (one.kind.gpu, one.kind.tp, one.kind.pp) == (kind.gpu, kind.tp, kind.pp)
    ]
    return next((one for one in alike if one.kind == kind), (alike or list(phases))[0])


def _share_nodes(question: Question, reader: Phases, writer: Phases) -> bool:
    """Whether a stage of both fits on a node, and layers lie alike (Algorithm 2)."""
    one, other = reader.kind, writer.kind
    return one.pp == other.pp and one.gpu == other.gpu and one.tp + other.tp <= question.hardware.per_node


def _links_are_slow(question: Question, kinds: Sequence[Kind]) -> bool:
    hardware = question.hardware
    if question.by_distserve or hardware.count <= hardware.per_node:
        return False
    kv_bytes = max(kind.kv_bytes for kind in kinds) * question.mean_prompt
    limit_s = question.slo.limits(round(question.mean_prompt)).ttft_s
    return kv_bytes / hardware.inter_bytes_per_s > _SLOW_SHARE * limit_s


def _check_limits(question: Question, kinds: Sequence[Kind]) -> None:
    """Raises NoPlanError for limits below what an empty machine does."""
    prompt = question.prompt_at(question.target)
    limits = question.slo.limits(prompt)
    for place, (name, limit_s) in enumerate((("ttft", limits.ttft_s), ("tpot", limits.tpot_s))):
        least_s, number = min((question.idle(kind, prompt)[place], index) for index, kind in enumerate(kinds))
        if least_s > limit_s:
            raise NoPlanError(
                f"--slo: {name} is {limit_s:g} s, but a request of {prompt} tokens alone takes "
                f"{least_s:.3g} s on the fastest worker that fits here ({kinds[number]}), and "
                f"{1 - question.target:.0%} of the prompts are no shorter; give at least that, a lower "
                "--target, or faster devices"
            )


def _why_none(question: Question, phases: Sequence[Phases]) -> str:
    reader = max(phases, key=lambda one: one.prefill.rate)
    writer = max(phases, key=lambda one: one.decode.rate)
    return (
        f"no plan serves {question.target:.0%} of the requests within both limits, however few there are: "
        f"the best reader ({reader.kind}) keeps TTFT up to {reader.prefill.rate:.3g} requests/s, the best "
        f"writer ({writer.kind}) TPOT up to {writer.decode.rate:.3g}; give looser limits, a lower --target, "
        "or more devices"
    )
