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
from cluster.planner.search import Answer, Phases, Show, apart
from cluster.workload.judge import Outcome

_MOST_STEPS = 12
_POOLED = 0.6
"""Of the workers that would each serve its share alone, so many do at least that serve all of it together."""
_OF_WRITING = {Outcome.TPOT_MISS}


@dataclass(frozen=True, slots=True)
class Enough:
    """A plan that serves the rate. cost: by the question's objective."""

    plan: Plan
    attainment: float
    cost: float


def cheapest(question: Question, answer: Answer, rate: float, executor: Executor, show: Show) -> list[Enough]:
    """Of the finalists' kinds and roles, each with as few workers as do; the cheapest first. Raises
    NoPlanError if there are not enough devices for any."""
    plans = list(dict.fromkeys(_as_one_each(one.plan) for one in answer.finalists))
    found: list[Enough] = []
    for number, enough in enumerate(executor.map(partial(_enough, question, answer.phases, rate), plans)):
        show((number + 1) / len(plans), f"for {rate:g} requests/s: {plans[number]}")
        if enough is not None:
            found.append(enough)
    if not found:
        best = answer.finalists[0]
        needed = math.ceil(rate / best.rate * best.plan.devices)
        raise NoPlanError(
            f"--for-rate {rate:g}: {question.hardware.count} devices serve {best.rate:.3g} requests/s at "
            f"most; about {needed} are needed, or a lower rate"
        )
    return sorted(found, key=lambda one: (one.cost, -one.attainment))


def _as_one_each(plan: Plan) -> Plan:
    return replace(plan, pools=tuple(replace(pool, replicas=1) for pool in plan.pools))


def _enough(question: Question, phases: Sequence[Phases], rate: float, plan: Plan) -> Enough | None:
    """As few workers as do; None if there are not so many devices."""
    readers = sum(pool.role.reads for pool in plan.pools)  # who share the prompts
    plan = replace(
        plan,
        pools=tuple(
            _at_least(pool, phases, rate / readers if pool.role.reads else rate) for pool in plan.pools
        ),
    )
    for _ in range(_MOST_STEPS):
        if not _fits(question, plan):
            return None
        unit, times = plan.unit()
        found = Counter[Outcome]()
        for seed in question.seeds:
            found.update(question.outcomes(unit, rate / times, seed))
        attainment = found[Outcome.GOOD] / found.total()
        if attainment >= question.target:
            return Enough(plan, attainment, plan.cost(question.objective))
        late_tokens = sum(found[outcome] for outcome in _OF_WRITING)
        late_starts = found.total() - found[Outcome.GOOD] - late_tokens
        plan = _one_more(plan, writes=late_tokens > late_starts)
    return None


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
    for devices in question.hardware.devices:
        held = sum(pool.devices for pool in plan.pools if pool.kind.gpu == devices.gpu)
        if held > devices.count:
            return False
    return True
