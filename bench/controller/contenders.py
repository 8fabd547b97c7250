"""Who decides on the roles of a simulated cluster: the controller of `prelay serve --controller act`, with
its own forecasts and rules, or somebody who leaves them as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.planner.hardware import Devices, Hardware
from cluster.planner.kinds import Kind
from cluster.planner.live import DEVICE, LEAST_ANSWERS
from cluster.pool_changes import Become, steps_to
from cluster.role_controller import DRAIN_S, TICK_S
from cluster.role_decider import Decision, RoleDecider, Shape, Verdict
from cluster.role_forecast import foresee, question_about
from cluster.roles import ROLE_NAMES
from cluster.simulator.cluster_spec import WorkerSpec
from cluster.simulator.reshaping import Change, Reshaping
from cluster.workload.datasets import Lengths
from cluster.workload.datasets import Shape as RequestShape
from cluster.workload.slo import Slo
from router.pool_view import Role
from router.workload_profile import Seen

_ROLES = {Role(name): role for role, name in ROLE_NAMES.items()}
_NAMED = {role: name for name, role in _ROLES.items()}


def shape_of(roles: Iterable[Role]) -> Shape:
    counts = Counter(roles)
    return Shape(*(counts[role] for role in Role))


def kind_of(workers: Mapping[Role, WorkerSpec]) -> Kind:
    """As a controller knows the workers of a running cluster (cluster/planner/live.py)."""
    specs = list(workers.values())
    return Kind(
        DEVICE,
        specs[0].devices,
        1,
        workers[Role.MIXED].latency,
        min(spec.kv_tokens for spec in specs),
        specs[0].kv_bytes,
        is_measured=True,
        batch_tokens=max(spec.max_batch_tokens for spec in specs),
        num_seqs=max(spec.max_num_seqs for spec in specs),
    )


@dataclass(frozen=True, slots=True)
class Look:
    """What the controller was told, and what it decided."""

    at_s: float
    present: Shape
    rate: float
    forecasts: Mapping[Shape, float]
    decision: Decision

    def to_json(self) -> dict[str, Any]:
        decision = self.decision
        return {
            "at_s": self.at_s,
            "present": str(self.present),
            "rate": self.rate,
            "forecasts": {str(shape): share for shape, share in self.forecasts.items()},
            "verdict": decision.verdict.value,
            "best": str(decision.best),
            "gain": decision.gain,
            "why": decision.why,
        }


@dataclass(slots=True)
class Watched:
    """Changes nothing. shapes: when the cluster took which, as far as it was asked."""

    shapes: list[tuple[float, Shape]] = field(default_factory=list)

    def look(self, now: float, roles: Mapping[str, Role], seen: Seen) -> Sequence[Change]:
        present = shape_of(roles.values())
        if not self.shapes or self.shapes[-1][1] != present:
            self.shapes.append((now, present))
        return ()


class Controlled(Watched):
    """As cluster/role_controller.py, told by a simulated cluster. In virtual time its forecasts take none."""

    def __init__(self, kind: Kind, slo: Slo, num_workers: int, decider: RoleDecider) -> None:
        super().__init__()
        self._kind = kind
        self._slo = slo
        self._hardware = Hardware([Devices(DEVICE, num_workers * kind.devices)])
        self._decider = decider
        self.looks: list[Look] = []

    def look(self, now: float, roles: Mapping[str, Role], seen: Seen) -> Sequence[Change]:
        super().look(now, roles, seen)
        if len(seen.shapes) < LEAST_ANSWERS or seen.latest_rate <= 0:
            return ()
        shapes = seen.shapes[-max(LEAST_ANSWERS, seen.num_latest) :]
        present = shape_of(roles.values())
        question = question_about(Lengths([RequestShape(*one) for one in shapes]), self._slo, self._hardware)
        forecasts = foresee(question, [self._kind], present, seen.latest_rate, self._decider.delta)
        decision = self._decider.look(now, present, forecasts)
        self.looks.append(Look(now, present, seen.latest_rate, forecasts, decision))
        if decision.verdict is not Verdict.CHANGE:
            return ()
        wanted = {_ROLES[role]: getattr(decision.best, role.value) for role in Role}
        steps = steps_to({worker_id: _ROLES[role] for worker_id, role in roles.items()}, wanted)
        return [(step.worker_id, _NAMED[step.role]) for step in steps if isinstance(step, Become)]


def reshaping(shaper: Watched, workers: Mapping[Role, WorkerSpec], away_s: float) -> Reshaping:
    """By the controller's own times."""
    return Reshaping(shaper, workers, TICK_S, DRAIN_S, away_s)
