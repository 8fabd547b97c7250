"""What if: the workload's prompts grow, its rate doubles, links are slower than they were said to be.

Every finalist is judged again under each change, so that it shows whether another one would have been the
better choice. Which finalists there are is not searched again.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial

from cluster.planner.errors import NoPlanError
from cluster.planner.goodput import Goodput
from cluster.planner.question import Question
from cluster.planner.search import Answer, Finalist, Show, measure_plan
from cluster.workload.judge import Outcome

FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class Changed:
    """what: the change, in words. finalists: as before, each judged anew, the best first. before: the plan
    that won without the change."""

    what: str
    finalists: Sequence[Finalist]
    before: Finalist

    @property
    def winner_before(self) -> Finalist:
        """What has become of the plan that had won."""
        return next(one for one in self.finalists if one.plan == self.before.plan)

    @property
    def of_before(self) -> float:
        """The goodput of the plan that had won, over what it was."""
        return self.winner_before.rate / self.before.rate


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """changed: by prompts and links. at_twice: attainment of the best plan at twice the rate that it serves,
    which so many times its devices would serve."""

    changed: Sequence[Changed]
    at_twice: float


def sensitivity(question: Question, answer: Answer, executor: Executor, show: Show) -> Sensitivity:
    """answer: to the question as it is."""
    best = answer.finalists[0]
    changes = [("prompts twice as long", replace(question, prompt_scale=FACTOR))]
    if not question.by_distserve:  # in whose rules hand-offs take no time
        changes.append(("links half as fast", replace(question, link_scale=1 / FACTOR)))
    changed = []
    for number, (what, asked) in enumerate(changes):
        show(number / len(changes), f"what if: {what}")
        judged = executor.map(partial(_judged, asked), answer.finalists)
        changed.append(Changed(what, sorted(judged, key=lambda one: -one.value), best))
    twice = FACTOR * best.goodput.rate
    found = [question.outcomes(best.unit, twice, seed) for seed in question.seeds]
    good = sum(counts[Outcome.GOOD] for counts in found)
    show(1.0, "what if: done")
    return Sensitivity(changed, good / sum(counts.total() for counts in found))


def _judged(question: Question, finalist: Finalist) -> Finalist:
    try:
        return measure_plan(question, finalist.plan, max(finalist.rate, 1e-3))
    except NoPlanError:  # some of the prompts fit nowhere any more
        none = Goodput(0.0, 0.0, 0.0, {}, is_none=True)
        return replace(finalist, goodput=none, value=0.0)
