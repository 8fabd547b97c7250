"""A request that waits at the gate of the goodput policy, and when it has to be read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum, auto

from router.gate.fairness import length_bin
from router.gate.line import Key
from router.gate.moore_hodgson import PLAIN
from router.requests import Request

SOON = 3.0
"""A request that could not be in time if nothing else were there is wanted within so many times of what
reading it takes."""
_MARGIN = 0.1
"""Of the time that a request may wait: what planning keeps in reserve for what it does not know."""


class Place(StrEnum):
    """In which line a request stands (`goodput.py` says what they are)."""

    RESUMED = auto()
    KEPT = auto()
    GIVEN_UP = auto()
    LATE = auto()


@dataclass(slots=True)
class Waiting:
    """read_s: what it takes of the readers' time, as predicted. can: whether it could be in time if nothing
    else were there. start_by: when reading has to begin, at the latest; plan_by: with something in reserve.
    length: its bin of prompt lengths. by_deadline, by_size, by_arrival: where it stands in a line. hold: in
    the last plan."""

    request: Request
    place: Place
    read_s: float
    can: bool
    start_by: float
    plan_by: float
    length: int
    by_deadline: Key
    by_size: Key
    by_arrival: Key
    hold: int = PLAIN

    @classmethod
    def of(cls, request: Request, number: int, read_s: float, pace: float) -> Waiting:
        """number: counts the requests as they come. pace: how fast readers have turned out to be, against
        what is predicted."""
        arrived_at, limit_s, priority = request.arrived_at, request.slo.limits.ttft_s, request.slo.priority
        own_s = read_s / pace
        can = own_s <= limit_s
        wait_s = limit_s - own_s if can else (SOON - 1) * own_s
        plan_by = arrived_at + (1 - _MARGIN) * wait_s
        return cls(
            request,
            Place.RESUMED if request.answered else Place.KEPT,
            read_s,
            can,
            start_by=arrived_at + wait_s,
            plan_by=plan_by,
            length=length_bin(len(request.prompt_token_ids)),
            by_deadline=(-priority, plan_by + own_s, number),
            by_size=(-priority, read_s, number),
            by_arrival=(arrived_at, number),
        )

    @property
    def due(self) -> float:
        """When reading has to be done, with something in reserve."""
        return self.by_deadline[1]

    @property
    def key(self) -> Key:
        """By what it stands in its line."""
        match self.place:
            case Place.RESUMED:
                return self.by_arrival
            case Place.KEPT:
                return self.by_deadline
            case _:
                return self.by_size
