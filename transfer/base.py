"""How KV gets from a peer's memory into ours: what every backend does, and what those share that see both.

Known backends, one file each: `ipc` (memory of processes on one host), `torchdist` (torch.distributed),
`nixl` (UCX: RDMA, TCP) and `memory` (one process, for tests). A worker has one endpoint for all its ranks,
in the process of its leader, which sees their memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from prelay.v1 import transfer_pb2

from engine.config import DTYPE_NBYTES
from transfer.errors import StaleBlocksError, TransferError
from transfer.handoff import LinkId
from transfer.layout import Box, Corner, Part, Route, WorkerLayout

if TYPE_CHECKING:
    # Importing it takes seconds, and simulated workers do without.
    import torch

Blocks: TypeAlias = "torch.Tensor | npt.NDArray[np.uint8]"
"""Bytes of KV; an array only in simulated workers, whose KV is small and in main memory."""

Generations: TypeAlias = npt.NDArray[np.uint32]
"""uint32 [num_blocks]"""


@dataclass(frozen=True, slots=True)
class KvMemory:
    """The KV of one worker.

    ranks: uint8 [num_blocks, block_nbytes of that rank], one for each rank, in order.
    """

    layout: WorkerLayout
    ranks: tuple[Blocks, ...]
    generations: Generations
    # The same memory as [num_blocks, layers, 2, tokens, heads, head nbytes]: made here, not for each copy.
    _blocks: tuple[Blocks, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        blocks = []
        for rank, whole in enumerate(self.ranks):
            layout = self.layout.rank(rank)
            *shape, head_dim = layout.block_shape
            blocks.append(whole.reshape(len(whole), *shape, head_dim * DTYPE_NBYTES[layout.dtype]))
        object.__setattr__(self, "_blocks", tuple(blocks))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """`ranks`. Raises TransferError where they are arrays."""
        return tuple(tensor_of(blocks) for blocks in self.ranks)

    def corner(self, corner: Corner, first: int, count: int) -> Blocks:
        """A view [count, layers, 2, tokens, heads, head nbytes] of `count` blocks from block `first` on."""
        self.check((first, first + count - 1))
        return self.all_blocks(corner)[first : first + count]

    def all_blocks(self, corner: Corner) -> Blocks:
        """The same of all blocks of its rank."""
        return self._blocks[corner.rank][:, corner.layers, :, corner.tokens, corner.heads]

    def check(self, blocks: Sequence[int]) -> None:
        """Raises TransferError if one of them does not exist."""
        num_blocks = len(self.ranks[0])
        if blocks and not (min(blocks) >= 0 and max(blocks) < num_blocks):
            wrong = next(block for block in blocks if not 0 <= block < num_blocks)
            raise TransferError(f"block {wrong} is offered; the worker has {num_blocks} blocks")

    def num_bytes(self, corner: Corner) -> int:
        """Of all its blocks."""
        layout = self.layout.rank(corner.rank)
        places = [part.stop - part.start for part in (corner.layers, corner.tokens, corner.heads)]
        each: int = math.prod(places) * 2 * layout.head_dim * DTYPE_NBYTES[layout.dtype]
        return len(corner.blocks) * each


class Pull(Protocol):
    """The decode side's end of one link: reads the blocks of one life of one peer. Called from one thread."""

    def pull(self, part: Part, boxes: Sequence[Box]) -> None:
        """Copy what `boxes` say from the peer into our memory; they are of `part`, or of some of its tokens.

        Raises StaleBlocksError if a generation differs from that in `part` after the copy,
        PeerUnreachableError if no further pull can succeed (the link is then dialled anew), and any other
        TransferError if this copy cannot be made; then the targets hold anything.
        """
        ...

    def close(self) -> None:
        """Let go of the peer. No pull runs or follows."""
        ...


class Backend(Protocol):
    """One way to move KV, at one worker; made with its KvMemory. It may be used in both directions."""

    @property
    def name(self) -> str:
        """As it is agreed on in the handshake and counted in the metrics."""
        ...

    def reaches(self, theirs: transfer_pb2.Handshake) -> bool:
        """Whether the puller that sent this handshake could use this backend with us, as far as we know."""
        ...

    def offer(self, link: LinkId, theirs: transfer_pb2.Handshake, answer: transfer_pb2.Handshake) -> None:
        """Prefill side: let the puller of this link read our memory. Writes into `answer` how it does that.

        Returns at once, in the asyncio thread. Raises TransferError.
        """
        ...

    def end_offer(self, link: LinkId) -> None:
        """Prefill side: the link is over. Its puller reads nothing any more, or finds out by generations."""
        ...

    def connect(self, theirs: transfer_pb2.Handshake, route: Route) -> Pull:
        """Decode side: open the peer's memory as its answer describes it. May take seconds; any thread.

        Raises TransferError.
        """
        ...

    def close(self) -> None:
        """End all offers. Pulls are closed by whoever opened them."""
        ...


def copy_boxes(source: KvMemory, part: Part, boxes: Sequence[Box], target: KvMemory) -> None:
    """The pull of a backend that sees the source as memory: copy first, then compare the generations.

    This is the reader's half of a seqlock. The owner bumps a generation before it gives the block to
    anybody who writes, so a copy that took one byte of the next user finds the generation changed. It
    relies on stores and loads keeping their order, which x86-64 promises and which elsewhere the
    interpreter's lock, taken between the copy and the comparison, sees to.
    """
    source.check(part.blocks)
    for box in boxes:
        source.check(box.source.blocks)
        target.check(box.target.blocks)
        theirs, ours = source.all_blocks(box.source), target.all_blocks(box.target)
        if on_cuda(ours) or on_cuda(theirs):
            to_tensor, from_tensor = tensor_of(ours), tensor_of(theirs)
            for at, to, count in runs(box.source.blocks, box.target.blocks):
                to_tensor[to : to + count].copy_(from_tensor[at : at + count])
            continue
        # numpy takes half of torch's time for small copies, and none of its threads.
        to_array, from_array = array_of(ours), array_of(theirs)
        for at, to, count in runs(box.source.blocks, box.target.blocks):
            to_array[to : to + count] = from_array[at : at + count]
    for device in {tensor_of(rank).device for rank in target.ranks if on_cuda(rank)}:
        import torch

        torch.cuda.current_stream(device).synchronize()
    check_generations(part, source.generations[list(part.blocks)])


def on_cuda(blocks: Blocks) -> bool:
    """Whether they are in a GPU's memory."""
    return not isinstance(blocks, np.ndarray) and blocks.is_cuda


def array_of(blocks: Blocks) -> npt.NDArray[np.uint8]:
    """The same bytes, which are in main memory."""
    return blocks if isinstance(blocks, np.ndarray) else blocks.numpy()


def tensor_of(blocks: Blocks) -> torch.Tensor:
    """Raises TransferError for an array: `ipc` alone does without torch."""
    if isinstance(blocks, np.ndarray):
        raise TransferError("KV of a simulated worker moves through ipc only: set transfer.backend to ipc")
    return blocks


def check_generations(part: Part, found: npt.NDArray[np.uint32]) -> None:
    """found: [len(part.blocks)], as they are after the copy. Raises StaleBlocksError."""
    stale = np.flatnonzero(found != np.asarray(part.generations, dtype=np.uint32))
    if stale.size:
        i = int(stale[0])
        raise StaleBlocksError(
            f"{stale.size} of {len(part.blocks)} blocks were recycled: block {part.blocks[i]} has "
            f"generation {int(found[i])}, {part.generations[i]} was offered"
        )


def runs(remote: Sequence[int], local: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(remote, local, count) of stretches that are contiguous on both sides: few large copies."""
    start = 0
    for i in range(1, len(remote) + 1):
        if i == len(remote) or remote[i] != remote[i - 1] + 1 or local[i] != local[i - 1] + 1:
            yield remote[start], local[start], i - start
            start = i
