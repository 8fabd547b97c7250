"""A request that has not ended, as the dispatcher keeps it: who works on it, and who reads it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from prelay.v1 import worker_pb2

from router.answer_stream import AnswerStream
from router.placement.base import Expected
from router.pool_view import Role
from router.record import RequestRecord
from router.requests import Request


class CommandLink(Protocol):
    """What dispatching needs of a worker (`worker_link.WorkerLink`)."""

    worker_id: str
    epoch: int
    role: Role
    info: worker_pb2.WorkerInfo

    def send(self, message: worker_pb2.RouterMessage) -> int:
        """Queues a command; returns its number."""


@dataclass(slots=True)
class LiveRequest:
    """request: as it is placed next, or was placed last: `request.answered` says from where it goes on.
    call: ids of all requests of the same call, its own included. paced: whether a reader who falls behind
    holds the answer up.
    """

    request: Request
    call: tuple[str, ...]
    record: RequestRecord
    stream: AnswerStream
    timer: asyncio.TimerHandle
    paced: bool
    # The placement in force; both None at the gate, prefill also when it was lost after it had done its part,
    # and when the decode worker is a mixed one that reads the prompt itself.
    prefill: CommandLink | None = None
    decode: CommandLink | None = None
    prefilling: bool = False  # Prefill was sent
    decoding: bool = False  # the decode worker has sent a token, so the hand-off is over
    paused: bool = False  # the decode worker was told to pause
    placed_at: float = 0.0
    expected: Expected | None = None  # what was predicted then
    waits: bool = True  # the answer has not begun
    travelling_tokens: int = 0  # of the hand-off: those that the decode worker has not cached
    # Of all placements.
    lost_attempts: int = 0
    recovered: bool = False  # a placement was lost after the first token
    avoid: set[str] = field(default_factory=set)  # workers that have failed it
    unread_timer: asyncio.TimerHandle | None = None  # set while too much is unread
    pause: asyncio.TimerHandle | None = None  # set when it has waited before it went to the gate again

    @property
    def is_local(self) -> bool:
        """Whether the worker that writes the answer reads the prompt, too."""
        return self.record.prefill_worker == self.record.decode_worker

    def needs(self, link: CommandLink) -> bool:
        """Whether the placement in force is lost with that worker. Once the hand-off is over and the prefill
        worker's token is here, there is nothing more to come from it."""
        handed_over = self.decoding and len(self.record.token_ids) > len(self.request.answered)
        return link is self.decode or (link is self.prefill and not handed_over)
