"""The backend `memory`: both workers live in one process. For tests, which may delay or spoil every copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prelay.v1 import transfer_pb2

from transfer.base import KvMemory, copy_boxes
from transfer.handoff import LinkId
from transfer.layout import Box, Part, Route


class MemoryBackend:
    """Backend between KvMemory objects of one process.

    peers: the memory of every worker of the process, by worker id; whoever makes the workers fills it.
    before_copy: called in the transfer thread before each copy with the part that will be read. It may wait,
    change the source as a prefill worker would that has given the blocks to somebody else, or raise
    TransferError.
    """

    name = "memory"

    def __init__(
        self,
        memory: KvMemory,
        peers: dict[str, KvMemory],
        before_copy: Callable[[Part], None] = lambda part: None,
    ) -> None:
        self._memory = memory
        self._peers = peers
        self._before_copy = before_copy

    def reaches(self, theirs: transfer_pb2.Handshake) -> bool:
        return theirs.worker_id in self._peers

    def offer(self, link: LinkId, theirs: transfer_pb2.Handshake, answer: transfer_pb2.Handshake) -> None:
        pass

    def end_offer(self, link: LinkId) -> None:
        pass

    def connect(self, theirs: transfer_pb2.Handshake, route: Route) -> MemoryPull:
        return MemoryPull(self._peers[theirs.worker_id], self._memory, self._before_copy)

    def close(self) -> None:
        pass


class MemoryPull:
    """Copies from `source` to `target`."""

    def __init__(self, source: KvMemory, target: KvMemory, before_copy: Callable[[Part], None]) -> None:
        self._source = source
        self._target = target
        self._before_copy = before_copy

    def pull(self, part: Part, boxes: Sequence[Box]) -> None:
        self._before_copy(part)
        copy_boxes(self._source, part, boxes, self._target)

    def close(self) -> None:
        pass
