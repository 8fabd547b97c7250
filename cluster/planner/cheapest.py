"""The cheapest plan for a rate: so many workers of each kind as it takes, and no more.

The phases apart say how many there must be at least, less what workers gain by sharing a queue. Then the
whole is simulated at that rate; if too few are good, the phase whose limit is missed more often gets another
worker, and so on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial

from cluster.planner.errors import NoPlanError
from cluster.planner.plans import Plan, Pool
from cluster.planner.question import Question
from cluster.planner.search import Answer, Finalist, Phases, Show, apart, most_near
from cluster.workload.judge import Outcome

_POOLED = 0.6
"""Of the workers that would each serve its share alone, so many do at least that serve all of it together."""

_ROUNDING = 1e-9
"""Three times a plan's rate over that rate may be more than three."""


@dataclass(frozen=True, slots=True)
class Enough:
    """A plan that serves the rate. cost: by the question's objective."""

    plan: Plan
    attainment: float
    cost: float


def cheapest(question: Question, answer: Answer, rate: float, executor: Executor, show: Show) -> list[Enough]:
    """Of the finalists' kinds and roles, each with as few workers as do; the cheapest first. Raises
    NoPlanError if there are not enough devices for any."""
    able = [one for one in answer.finalists if one.goodput.rate > 0]
    found: list[Enough] = []
    for number, enough in enumerate(executor.map(partial(_enough, question, answer.phases, rate), able)):
        show((number + 1) / len(able), f"for {rate:g} requests/s: {able[number].plan}")
        if enough is not None:
            found.append(enough)
    if not found:
        most = max(one.rate for one in able)
        needed = min(_whole_units(one, rate).devices for one in able)
        raise NoPlanError(
            f"--for-rate {rate:g}: of {question.hardware.count} devices the best plan serves {most:.3g} "
            f"requests/s; give about {needed} devices, or a lower rate"
        )
    best = {one.plan: one for one in found}
    return sorted(best.values(), key=lambda one: (one.cost, -one.attainment))


def _enough(question: Question, phases: Sequence[Phases], rate: float, finalist: Finalist) -> Enough | None:
    """As few workers as do, but not more than as many of what was simulated as serve the rate side by side,
    unless these are just too few; None if there are not so many devices."""
    plan = finalist.plan
    readers = sum(pool.role.reads for pool in plan.pools)  # who share the prompts
    pools = (_at_least(pool, phases, rate / readers if pool.role.reads else rate) for pool in plan.pools)
    plan, most = replace(plan, pools=tuple(pools)), _whole_units(finalist, rate)
    most_cost = most.cost(question.objective)
    if plan.cost(question.objective) >= most_cost:
        plan = most
    while _fits(question, plan):
        found = _outcomes(question, plan, rate)
        cost = plan.cost(question.objective)
        if found[Outcome.GOOD] >= question.target * found.total():
            return Enough(plan, found[Outcome.GOOD] / found.total(), cost)
        late_tokens = found[Outcome.TPOT_MISS]
        late_starts = found.total() - found[Outcome.GOOD] - late_tokens
        more = _one_more(plan, writes=late_tokens > late_starts)
        plan = most if cost < most_cost <= more.cost(question.objective) else more
    return None


def _whole_units(finalist: Finalist, rate: float) -> Plan:
    """So many of what was simulated that each serves its part of the rate."""
    times = max(1, math.ceil(rate / finalist.goodput.rate - _ROUNDING))
    pools = (replace(pool, replicas=times * pool.replicas) for pool in finalist.unit.pools)
    return replace(finalist.plan, pools=tuple(pools))


def _outcomes(question: Question, plan: Plan, rate: float) -> Counter[Outcome]:
    unit, times = plan.unit()
    found = Counter[Outcome]()
    for seed in question.seeds:
        found.update(question.outcomes(unit, rate / times, seed))
    return found


def _at_least(pool: Pool, phases: Sequence[Phases], rate: float) -> Pool:
    alone = apart(Plan((replace(pool, replicas=1),)), phases)
    return replace(pool, replicas=max(1, math.ceil(_POOLED * rate / max(alone, 1e-9))))


def _one_more(plan: Plan, *, writes: bool) -> Plan:
    """A worker more that writes, or that reads. Workers that share nodes come in pairs."""
    chosen = [pool for pool in plan.pools if (pool.role.writes if writes else pool.role.reads)]
    grow = plan.pools if plan.is_near else (chosen or plan.pools)[:1]
    pools = tuple(replace(pool, replicas=pool.replicas + 1) if pool in grow else pool for pool in plan.pools)
    return replace(plan, pools=pools)


def _fits(question: Question, plan: Plan) -> bool:
    if plan.is_near:
        reader, writer = plan.pools
        return max(reader.replicas, writer.replicas) <= most_near(question, reader.kind, writer.kind)
    for devices in question.hardware.devices:
        held = sum(pool.devices for pool in plan.pools if pool.kind.gpu == devices.gpu)
        if held > devices.count:
            return False
    return True
