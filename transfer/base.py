"""How KV blocks get from a peer's memory into ours: the backends' interface, and the copy they share.

Known backends: `ipc` (shared memory between processes on one host) and `memory` (one process, for tests).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from transfer.errors import StaleBlocksError, TransferError

Blocks: TypeAlias = npt.NDArray[np.uint8]
"""uint8 [num_blocks, block_nbytes]"""

Generations: TypeAlias = npt.NDArray[np.uint32]
"""uint32 [num_blocks]"""


class PullBackend(Protocol):
    """Reads blocks of one life of one peer; opened once per link. Called from the transfer thread only."""

    @property
    def name(self) -> str:
        """As it is agreed on in the handshake and counted in the metrics."""
        ...

    def pull(self, remote: Sequence[int], generations: Sequence[int], local: Sequence[int]) -> None:
        """Copy the peer's blocks `remote` into our blocks `local`, of which there are as many.

        generations: those of the remote blocks when they were offered.
        Raises StaleBlocksError if one of them differs after the copy, TransferError if the copy cannot be
        made; then the local blocks hold anything.
        """
        ...

    def close(self) -> None:
        """Let go of the peer's memory. No pull runs or follows."""
        ...


def copy_blocks(
    source: Blocks,
    source_generations: Generations,
    remote: Sequence[int],
    generations: Sequence[int],
    target: Blocks,
    local: Sequence[int],
) -> None:
    """The pull of a backend that sees the source as memory: copy first, then compare the generations.

    This is the reader's half of a seqlock. The owner bumps a generation before it gives the block to
    anybody who writes, so a copy that took one byte of the next user finds the generation changed. It
    relies on stores and loads keeping their order, which x86-64 promises and which elsewhere the
    interpreter's lock, taken between the copy and the comparison, sees to.
    """
    for at, to, count in _runs(remote, local):
        if at + count > len(source):
            raise TransferError(f"block {at + count - 1} is offered; the peer has {len(source)} blocks")
        target[to : to + count] = source[at : at + count]
    found = source_generations[list(remote)]
    stale = np.flatnonzero(found != np.asarray(generations, dtype=np.uint32))
    if stale.size:
        i = int(stale[0])
        raise StaleBlocksError(
            f"{stale.size} of {len(remote)} blocks were recycled: "
            f"block {remote[i]} has generation {int(found[i])}, {generations[i]} was offered"
        )


def _runs(remote: Sequence[int], local: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(remote, local, count) of stretches that are contiguous on both sides: few large copies."""
    start = 0
    for i in range(1, len(remote) + 1):
        if i == len(remote) or remote[i] != remote[i - 1] + 1 or local[i] != local[i - 1] + 1:
            yield remote[start], local[start], i - start
            start = i
