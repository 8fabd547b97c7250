"""The interface of admission: which requests are let in, and as what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from router.errors import RouterError
from router.requests import Request


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not let in.

    reason: for the metrics. counts: whether it is the deployment that falls short (outcome "rejected", which
    stays in the denominator of attainment) and not the request that asks for the impossible.
    """

    reason: str
    error: RouterError
    counts: bool


class Admission(Protocol):
    """A core: told `now`, judges by what its constructor was given to see (pool, gate, estimates)."""

    def judge(self, request: Request, now: float, ahead: int, *, overdue: bool) -> Request | Refusal:
        """The request as it is let in, which is the one given unless it was downgraded to another SLO class;
        or the refusal.

        ahead: requests of the same call that are let in with it. overdue: no pair has been linked for so long
        that it is no use to wait.
        """

    def misfit(self, request: Request) -> RouterError | None:
        """The error of a request that no worker that is up could ever hold; there must be some that can read
        and some that can write. For what waits at the gate when the pool has changed."""

    def could_have_served(self, now: float) -> int:
        """Of the requests that were refused because they would be late: how many, since the last call, have
        turned out to be refused in vain, as there was room for them in time after all. Called when the
        dispatcher has placed what it could."""
