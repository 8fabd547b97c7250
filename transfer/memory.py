"""The backend `memory`: both workers in one process. For tests, which may slow down or spoil every copy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prelay.v1 import transfer_pb2

from transfer.base import KvMemory, copy_boxes
from transfer.errors import PeerUnreachableError
from transfer.handoff import LinkId
from transfer.layout import Box, Part, Route


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a copy takes: delay_s and then its bytes at bytes_per_s. sleep: passes that time."""

    delay_s: float = 0.0
    bytes_per_s: float = math.inf
    sleep: Callable[[float], None] = time.sleep


def _nothing(part: Part) -> None:
    pass


class MemoryBackend:
    """Backend between KvMemory objects of one process.

    peers: the memory of every worker of the process, by worker id; whoever makes the workers fills it, and
    takes those out that die.
    before_copy, after_copy: called in the thread that copies, with the part. They may wait, raise
    TransferError, change the source as a prefill worker would that has given the blocks to somebody else, or
    (after_copy) spoil the target as a bad network would.
    """

    name = "memory"

    def __init__(
        self,
        memory: KvMemory,
        peers: dict[str, KvMemory],
        before_copy: Callable[[Part], None] = _nothing,
        after_copy: Callable[[Part], None] = _nothing,
        pace: Pace | None = None,
    ) -> None:
        self.memory = memory
        self.peers = peers
        self.before_copy = before_copy
        self.after_copy = after_copy
        self.pace = pace or Pace()

    def reaches(self, theirs: transfer_pb2.Handshake) -> bool:
        return theirs.worker_id in self.peers

    def offer(self, link: LinkId, theirs: transfer_pb2.Handshake, answer: transfer_pb2.Handshake) -> None:
        pass

    def end_offer(self, link: LinkId) -> None:
        pass

    def connect(self, theirs: transfer_pb2.Handshake, route: Route) -> MemoryPull:
        return MemoryPull(self, theirs.worker_id)

    def close(self) -> None:
        pass


class MemoryPull:
    """Copies from the peer of that name, as its backend was told to."""

    def __init__(self, backend: MemoryBackend, peer: str) -> None:
        if peer not in backend.peers:
            raise PeerUnreachableError(f"{peer} is not in this process")
        self._backend = backend
        self._peer = peer
        self._source = backend.peers[peer]

    def pull(self, part: Part, boxes: Sequence[Box]) -> None:
        backend = self._backend
        backend.before_copy(part)
        num_bytes = sum(backend.memory.num_bytes(box.target) for box in boxes)
        seconds = backend.pace.delay_s + num_bytes / backend.pace.bytes_per_s
        if seconds:
            backend.pace.sleep(seconds)
        if backend.peers.get(self._peer) is not self._source:
            raise PeerUnreachableError(f"{self._peer} is gone")
        copy_boxes(self._source, part, boxes, backend.memory)
        backend.after_copy(part)

    def close(self) -> None:
        pass
