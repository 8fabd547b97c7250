"""A policy: how requests are admitted, in which order they wait, and where they are placed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from router.admission.base import Admission
from router.gate.base import GateQueue
from router.placement.base import Placement


def _at_any_moment() -> float:
    return 0.0


@dataclass(frozen=True, slots=True)
class Policy:
    """name: by which it is selected (`policies.py`). tells_urgency: whether workers are told how urgent a
    request is; those that are not told serve first come first served, in steps of fixed size.
    retry_s: how long it takes at least, after a round in which nobody could be placed, until the passing of
    time alone may change that."""

    name: str
    admission: Admission
    gate: GateQueue
    placement: Placement
    tells_urgency: bool
    retry_s: Callable[[], float] = _at_any_moment
