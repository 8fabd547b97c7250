"""Which runs of a peer's bytes are read for a part of the KV, and what is done with them then.

The layers of a block are read whole into a buffer, once for all boxes that want something of them, and copied
from there. Also where they could go straight to where they belong: a read that is given up cannot be called
back (over TCP its bytes come when a stopped peer goes on), and must not end in blocks that are somebody
else's by then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import TypeAlias

import torch

from engine.config import DTYPE_NBYTES
from transfer.base import KvMemory, runs, tensor_of
from transfer.errors import TransferError
from transfer.layout import Box, Part, WorkerLayout
from transfer.nixl_agent import Place

_Layers: TypeAlias = tuple[int, int, int]
"""rank, and its layers from, to"""


@dataclass(frozen=True)
class RemoteKv:
    """KvMemory of another process. generations: uint32 [num_blocks]"""

    layout: WorkerLayout
    ranks: Sequence[Place]
    generations: Place

    @property
    def num_blocks(self) -> int:
        return self.generations.num_bytes // 4

    def generations_of(self, blocks: range) -> Place:
        whole = self.generations
        return Place(whole.address + 4 * blocks.start, 4 * len(blocks), whole.memory, whole.device)

    def check(self, blocks: Iterable[int]) -> None:
        """Raises TransferError if one of the blocks does not exist."""
        for block in blocks:
            if not 0 <= block < self.num_blocks:
                raise TransferError(f"block {block} is offered; the worker has {self.num_blocks} blocks")


@dataclass(frozen=True, slots=True)
class Read:
    """theirs go one after the other into a buffer, and from there to `boxes`.

    block_view: the buffer's shape, [blocks, layers, 2, block size, heads, head nbytes]. blocks: its blocks,
    as the source counts them.
    """

    theirs: Sequence[Place]
    target: KvMemory
    blocks: Sequence[int]
    block_view: tuple[int, ...]
    boxes: Sequence[Box]

    @property
    def buffer_nbytes(self) -> int:
        return math.prod(self.block_view)

    def ours(self, buffer: torch.Tensor) -> Sequence[Place]:
        """buffer: uint8 [buffer_nbytes]"""
        ends = list(accumulate(place.num_bytes for place in self.theirs))
        return [Place.of(buffer[start:end]) for start, end in pairwise([0, *ends])]

    def then(self, buffer: torch.Tensor) -> None:
        """The bytes have come."""
        view = buffer.view(self.block_view)
        place = {block: at for at, block in enumerate(self.blocks)}
        for box in self.boxes:
            pairs = [
                (place[source], target)
                for source, target in zip(box.source.blocks, box.target.blocks, strict=True)
                if source in place
            ]
            wanted = view[:, :, :, box.source.tokens, box.source.heads]
            ours = tensor_of(self.target.all_blocks(box.target))
            for at, to, count in runs([at for at, _ in pairs], [to for _, to in pairs]):
                ours[to : to + count].copy_(wanted[at : at + count])
        if buffer.is_cuda:
            torch.cuda.current_stream(buffer.device).synchronize()  # the next read into it asks no stream


def plan_reads(
    source: RemoteKv, part: Part, boxes: Sequence[Box], target: KvMemory, limit_nbytes: int
) -> list[Read]:
    """Each of at most limit_nbytes, or of one block. Raises TransferError if a block does not exist."""
    source.check(part.blocks)
    for box in boxes:
        target.check(box.target.blocks)

    def layers(box: Box) -> _Layers:
        return box.source.rank, box.source.layers.start, box.source.layers.stop

    reads: list[Read] = []
    for (rank, start, stop), of_layers in groupby(sorted(boxes, key=layers), key=layers):
        reads += _reads(source, rank, slice(start, stop), list(of_layers), target, limit_nbytes)
    return reads


def _reads(
    source: RemoteKv, rank: int, layers: slice, boxes: Sequence[Box], target: KvMemory, limit_nbytes: int
) -> Iterator[Read]:
    theirs = _Blocks(source.layout, rank, source.ranks[rank], layers)
    blocks = list(dict.fromkeys(block for box in boxes for block in box.source.blocks))
    step = max(1, limit_nbytes // theirs.nbytes)
    for first in range(0, len(blocks), step):
        some = blocks[first : first + step]
        yield Read(theirs.places(some), target, some, (len(some), *theirs.shape), boxes)


class _Blocks:
    """Some layers of each of a rank's blocks, where they lie."""

    def __init__(self, layout: WorkerLayout, rank: int, whole: Place, layers: slice) -> None:
        of_rank = layout.rank(rank)
        num_layers, *shape, head_dim = of_rank.block_shape
        layer_nbytes = of_rank.block_nbytes // num_layers
        self.shape = (layers.stop - layers.start, *shape, head_dim * DTYPE_NBYTES[of_rank.dtype])
        self.nbytes = (layers.stop - layers.start) * layer_nbytes
        self.is_whole = layers == slice(0, num_layers)
        self._stride = of_rank.block_nbytes
        self._offset = layers.start * layer_nbytes
        self._in = whole

    def places(self, blocks: Sequence[int]) -> list[Place]:
        """In order; where these are all layers, blocks that lie together are one."""
        stretches = [(first, count) for first, _, count in runs(blocks, range(len(blocks)))]
        if not self.is_whole:
            stretches = [(block, 1) for block in blocks]
        return [self._place(block, count) for block, count in stretches]

    def _place(self, block: int, count: int) -> Place:
        start = block * self._stride + self._offset
        nbytes = (count - 1) * self._stride + self.nbytes
        if not 0 <= start <= start + nbytes <= self._in.num_bytes:
            raise TransferError(f"block {block + count - 1} is offered; the worker's memory ends before it")
        return Place(self._in.address + start, nbytes, self._in.memory, self._in.device)
