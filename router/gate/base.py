"""The interface of the gate queue: which of the waiting requests is placed next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from router.requests import Request


class GateQueue(Protocol):
    """Decides who goes next. A core: told `now`, holds no clock."""

    def add(self, request: Request) -> None:
        """Takes a request in; one that comes back after a placement that failed is added again."""

    def remove(self, request_id: str) -> None:
        """Takes a request out that has ended; one that is not here is ignored."""

    def placed(self, request_id: str) -> None:
        """Takes a request out that `next` has given, and that now is with its workers."""

    def next(self, now: float) -> Iterable[Request]:
        """The requests that may be placed now, the first to be tried first; they stay in the queue.

        The dispatcher places the first one for which the placement finds room, and asks again. So where only
        one is given, what cannot be placed lets nobody pass. A few at most: each costs a decision.
        """

    def __len__(self) -> int: ...
