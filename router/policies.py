"""The policies by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from router.admission.structural import StructuralAdmission
from router.estimates import Estimates
from router.gate.fcfs import FcfsGateQueue
from router.placement.least_loaded import LeastLoadedPlacement
from router.policy import Policy
from router.pool_view import PoolView


@dataclass(frozen=True, slots=True)
class PolicyInputs:
    """What policies are made from. max_gated_requests, retry_after_s: see RouterSettings."""

    pool: PoolView
    estimates: Estimates
    rng: random.Random
    max_gated_requests: int
    retry_after_s: float


def _least_loaded(inputs: PolicyInputs) -> Policy:
    gate = FcfsGateQueue()
    admission = StructuralAdmission(inputs.pool, gate, inputs.max_gated_requests, inputs.retry_after_s)
    return Policy("least_loaded", admission, gate, LeastLoadedPlacement(inputs.pool), tells_urgency=False)


POLICIES: Mapping[str, Callable[[PolicyInputs], Policy]] = {"least_loaded": _least_loaded}
"""Makers of policies."""
