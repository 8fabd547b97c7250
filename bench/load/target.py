"""The server that requests are sent to, as far as the load generator has to know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from bench.load.answer import Answer
from cluster.workload.jobs import Job
from cluster.workload.slo import Limits


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says of itself, None where it does not. how: the form in which it takes requests."""

    model: str
    max_model_len: int | None
    vocab_size: int | None
    how: str


class Call(Protocol):
    """A request that is ready to go: serialised before the clock runs."""

    async def __call__(self, answer: Answer) -> None:
        """Sends it, and tells `answer` what comes. What goes wrong is told there, too, never raised."""


class Target(Protocol):
    """One server."""

    async def check(self) -> ServerInfo:
        """Asks what is there, with a request of a few tokens. To be called once, first.

        Raises NotAServerError.
        """

    def prepare(self, job: Job, limits: Limits | None) -> Call:
        """limits: told to the server, if it has an ear for them."""
