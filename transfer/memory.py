"""The backend `memory`: both workers live in one process. For tests, which may delay or spoil every copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transfer.base import copy_blocks
from transfer.ipc import SharedSegment


class MemoryBackend:
    """PullBackend that copies from `source` to `target`.

    before_copy: called in the transfer thread before each copy with the blocks that will be read. It may
    wait, change the source as a prefill worker would that has given the blocks to somebody else, or raise
    TransferError.
    """

    name = "memory"

    def __init__(
        self,
        source: SharedSegment,
        target: SharedSegment,
        before_copy: Callable[[Sequence[int]], None] = lambda blocks: None,
    ) -> None:
        self._source = source
        self._target = target
        self._before_copy = before_copy

    def pull(self, remote: Sequence[int], generations: Sequence[int], local: Sequence[int]) -> None:
        self._before_copy(remote)
        source, target = self._source, self._target
        copy_blocks(source.blocks, source.generations, remote, generations, target.blocks, local)

    def close(self) -> None:
        pass
