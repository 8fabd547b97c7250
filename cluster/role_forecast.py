"""What the simulator expects of the shapes that a cluster could have: the controller's foresight. A core."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.planner.hardware import Hardware
from cluster.planner.kinds import Kind
from cluster.planner.plans import Plan, Pool
from cluster.planner.question import Question
from cluster.role_decider import Shape
from cluster.workload.arrivals import Arrivals
from cluster.workload.datasets import Dataset
from cluster.workload.drawing import WorkloadSpec
from cluster.workload.judge import Outcome
from cluster.workload.slo import Slo
from router.pool_view import Role

_COUNT, _SETTLE_S = 150, 20.0
"""Of a simulation: requests at least, and how long it lasts."""
_MOST_CHANGES = 3


def question_about(dataset: Dataset, slo: Slo, hardware: Hardware) -> Question:
    """What comes is like that, at random times."""
    spec = WorkloadSpec(dataset, Arrivals.parse("poisson"), range(0))
    return Question(spec, slo, hardware, count=_COUNT, seeds=(0,), settle_s=_SETTLE_S, is_owned=True)


def foresee(
    question: Question, kinds: Sequence[Kind], present: Shape, rate: float, delta: float
) -> dict[Shape, float]:
    """Attainment of the present shape; unless that leaves no more than `delta` to gain, of those that one
    change leads to; and so on from the best of these, a few changes far."""
    found = dict(zip([present], forecast(question, kinds, [present], rate), strict=True))
    at = present
    for _ in range(_MOST_CHANGES):
        if found[at] + delta >= 1:
            break
        new = [shape for shape in at.neighbours() if shape not in found]
        found |= zip(new, forecast(question, kinds, new, rate), strict=True)
        best = max(at.neighbours(), key=lambda shape: found[shape])
        if found[best] <= found[at]:
            break
        at = best
    return found


def forecast(question: Question, kinds: Sequence[Kind], shapes: Sequence[Shape], rate: float) -> list[float]:
    """Attainment of each shape, whose workers are all of the kind that most are of, by the same requests."""
    kind = kinds[0]
    found = []
    for shape in shapes:
        sizes = ((role, getattr(shape, role.value)) for role in Role)
        plan = Plan(tuple(Pool(role, kind, size) for role, size in sizes if size))
        outcomes = question.outcomes(plan, rate, question.seeds[0])
        found.append(outcomes[Outcome.GOOD] / max(1, outcomes.total()))
    return found
