"""The policies by name: the one that serves goodput, and those of the field to compare it with."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from router.admission.goodput import GoodputAdmission
from router.admission.mooncake import MooncakeAdmission
from router.admission.structural import StructuralAdmission
from router.estimates import Estimates
from router.gate.fcfs import FcfsGateQueue
from router.gate.goodput import GoodputGateQueue
from router.gate.readers import Readers
from router.placement.base import Placement
from router.placement.cache_aware import CacheAwarePlacement
from router.placement.colocated import ColocatedPlacement
from router.placement.goodput import GoodputPlacement
from router.placement.least_loaded import LeastLoadedPlacement
from router.placement.power_of_two import PowerOfTwoPlacement
from router.placement.reject_forward import RejectForwardPlacement
from router.placement.round_robin import RoundRobinPlacement
from router.policy import Policy
from router.pool_view import PoolView
from router.prefix_index import PrefixIndex


@dataclass(frozen=True, slots=True)
class PolicyInputs:
    """What policies are made from. max_gated_requests, retry_after_s: see RouterSettings."""

    pool: PoolView
    prefixes: PrefixIndex
    estimates: Estimates
    rng: random.Random
    max_gated_requests: int
    retry_after_s: float


def _goodput(inputs: PolicyInputs) -> Policy:
    pool, estimates = inputs.pool, inputs.estimates
    gate = GoodputGateQueue(Readers(pool, estimates, inputs.prefixes))
    admission = GoodputAdmission(pool, gate, estimates, inputs.max_gated_requests, inputs.retry_after_s)
    placement = GoodputPlacement(pool, estimates, inputs.prefixes, inputs.rng, gate.is_its_turn)
    return Policy(
        "goodput", admission, gate, placement, tells_urgency=True, retry_s=lambda: placement.retry_s
    )


def _least_loaded(inputs: PolicyInputs) -> Policy:
    return _fcfs("least_loaded", inputs, LeastLoadedPlacement(inputs.pool))


def _round_robin(inputs: PolicyInputs) -> Policy:
    return _fcfs("round_robin", inputs, RoundRobinPlacement(inputs.pool))


def _power_of_two(inputs: PolicyInputs) -> Policy:
    return _fcfs("power_of_two", inputs, PowerOfTwoPlacement(inputs.pool, inputs.estimates, inputs.rng))


def _reject_forward(inputs: PolicyInputs) -> Policy:
    return _fcfs("reject_forward", inputs, RejectForwardPlacement(inputs.pool))


def _cache_aware(inputs: PolicyInputs) -> Policy:
    gate, placement = FcfsGateQueue(), CacheAwarePlacement(inputs.pool, inputs.estimates)
    admission = MooncakeAdmission(_structural(inputs, gate), placement, inputs.retry_after_s)
    return Policy("cache_aware", admission, gate, placement, tells_urgency=False)


def _colocated(inputs: PolicyInputs) -> Policy:
    return _fcfs("colocated", inputs, ColocatedPlacement(inputs.pool))


def _fcfs(name: str, inputs: PolicyInputs, placement: Placement) -> Policy:
    """First come first served, with nobody refused for being late."""
    gate = FcfsGateQueue()
    return Policy(name, _structural(inputs, gate), gate, placement, tells_urgency=False)


def _structural(inputs: PolicyInputs, gate: FcfsGateQueue) -> StructuralAdmission:
    return StructuralAdmission(inputs.pool, gate, inputs.max_gated_requests, inputs.retry_after_s)


POLICIES: Mapping[str, Callable[[PolicyInputs], Policy]] = {
    "goodput": _goodput,
    "least_loaded": _least_loaded,
    "round_robin": _round_robin,
    "power_of_two": _power_of_two,
    "reject_forward": _reject_forward,
    "cache_aware": _cache_aware,
    "colocated": _colocated,
}
"""Makers of policies."""
