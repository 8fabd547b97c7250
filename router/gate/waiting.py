"""A request that waits at the gate of the goodput policy, and when it has to be read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from router.gate.fairness import length_bin
from router.gate.line import Key
from router.requests import Request

SOON = 3.0
"""A request that could not be in time if nothing else were there is wanted within so many times of what
reading it takes."""
_MARGIN = 0.1
"""Of the time that a request may wait: what planning keeps in reserve for what it does not know."""


class Place(Enum):
    """In which line a request stands (`goodput.py` says what they are)."""

    RESUMED = auto()
    KEPT = auto()
    GIVEN_UP = auto()
    LATE = auto()


@dataclass(slots=True)
class Waiting:
    """number: counts the requests as they come. read_s: what it takes a reader. start_by: when reading has to
    begin, at the latest; plan_by: with something in reserve. can: whether it could be in time if nothing else
    were there. guarded: in the last plan."""

    request: Request
    number: int
    place: Place
    read_s: float
    start_by: float
    plan_by: float
    can: bool
    guarded: bool = False

    @classmethod
    def of(cls, request: Request, number: int, read_s: float) -> Waiting:
        limit_s = request.slo.limits.ttft_s
        can = read_s <= limit_s
        wait_s = limit_s - read_s if can else (SOON - 1) * read_s
        return cls(
            request,
            number,
            Place.RESUMED if request.answered else Place.KEPT,
            read_s,
            start_by=request.arrived_at + wait_s,
            plan_by=request.arrived_at + (1 - _MARGIN) * wait_s,
            can=can,
        )

    @property
    def due(self) -> float:
        """When reading has to be done, with something in reserve."""
        return self.plan_by + self.read_s

    @property
    def length(self) -> int:
        """Its bin of prompt lengths."""
        return length_bin(len(self.request.prompt_token_ids))

    @property
    def by_arrival(self) -> Key:
        return (self.request.arrived_at, self.number)

    @property
    def by_deadline(self) -> Key:
        return (-self.request.slo.priority, self.due, self.number)

    @property
    def by_size(self) -> Key:
        return (-self.request.slo.priority, self.read_s, self.number)

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
