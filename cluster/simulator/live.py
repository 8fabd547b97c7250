"""A request in the simulated cluster, from its arrival to its row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from cluster.workload.jobs import Row, Status
from engine.sequence import RequestKey
from engine.urgency import Urgency
from router.placement.base import Decision
from router.pool_view import WorkerCapacity
from router.requests import Request
from router.stages import StageClock


@dataclass(frozen=True, slots=True)
class Placed:
    """What a worker is told of a request. cached_tokens: that the writer has already."""

    live: Live
    key: RequestKey
    request: Request
    urgency: Urgency | None
    cached_tokens: int = 0


class SimulatedWorker(Protocol):
    """What others have to know of one."""

    @property
    def worker_id(self) -> str: ...

    @property
    def capacity(self) -> WorkerCapacity: ...

    def tell(self, what: Callable[[], None]) -> None:
        """It takes effect between steps."""

    def command(self, number: int, what: Callable[[], None]) -> None:
        """The same, from the router, which numbers what it says."""

    def cancel(self, key: RequestKey) -> None: ...


class SimulatedReader(SimulatedWorker, Protocol):
    """A prefill worker."""

    def read(self, placed: Placed, writer: SimulatedWriter) -> None:
        """For that writer."""


class SimulatedWriter(SimulatedWorker, Protocol):
    """A decode or mixed worker."""

    def reserve(self, placed: Placed, *, is_local: bool) -> None:
        """is_local: it is to read the prompt, too."""

    def deliver(self, key: RequestKey, transfer_s: float, ready: float) -> None:
        """All of its KV is there, which took transfer_s longer than its prefill."""


@dataclass(slots=True, eq=False)
class Live:
    """number: of its arrival. request: as it is to be placed next, with what of its answer is out.

    attempt, key: of the placement in force. reader: None if `writer` reads the prompt, too. num_emitted: of
    its answer, that the router has. travelling_tokens: whose KV the writer had not already.
    """

    number: int
    request: Request
    stages: StageClock
    attempt: int = 0
    key: RequestKey = field(init=False)
    decision: Decision | None = None
    reader: SimulatedReader | None = None
    writer: SimulatedWriter | None = None
    lost_attempts: int = 0
    num_emitted: int = 0
    travelling_tokens: int = 0
    is_reading: bool = False
    is_handed_over: bool = False
    first_at: float | None = None

    def __post_init__(self) -> None:
        self.key = RequestKey(self.request.request_id, 0)

    def place(self, decision: Decision) -> None:
        """A new attempt."""
        self.attempt += 1
        self.key = RequestKey(self.request.request_id, self.attempt)
        self.decision = decision
        self.is_reading = self.is_handed_over = False

    def needs(self, worker: SimulatedWorker) -> bool:
        """Whether it cannot go on without that worker."""
        return self.writer is worker or (self.reader is worker and not self.is_handed_over)

    def going_on(self) -> None:
        """What is placed next begins after what is out. What the tokens say does not matter here."""
        self.request = self.request.going_on((0,) * self.num_emitted)

    def row(self, status: Status, now: float | None, error: str = "") -> Row:
        """As its client saw it. now: when its last token came; None if none did."""
        request = self.request
        sent_s = request.arrived_at
        first_s = None if self.first_at is None else self.first_at - sent_s
        last_s = None if now is None or first_s is None else now - sent_s
        stages = {} if now is None else {stage.value: s for stage, s in self.stages.finish(now).items()}
        return Row(
            sent_s,
            sent_s,
            len(request.prompt_token_ids),
            self.num_emitted,
            status,
            first_s,
            last_s,
            stages=stages,
            error=error,
        )
