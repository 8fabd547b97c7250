"""Which runs of a peer's bytes are read for a part of the KV, and what is done with them then.

Between equal ranks a block's layers lie the same way on both sides and go straight to where they belong.
Otherwise they are read whole into a buffer, once for all boxes that want something of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import TypeAlias

import torch

from engine.config import DTYPE_NBYTES
from transfer.base import KvMemory, runs
from transfer.errors import TransferError
from transfer.layout import Box, Corner, Part, WorkerLayout
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
    """theirs[i] goes to straight[i]; or, one after the other, into a buffer, and from there to `boxes`.

    block_view: the buffer's shape, [blocks, layers, 2, block size, heads, head nbytes]. blocks: its blocks,
    as the source counts them.
    """

    theirs: Sequence[Place]
    straight: Sequence[Place]
    target: KvMemory
    blocks: Sequence[int] = ()
    block_view: tuple[int, ...] = ()
    boxes: Sequence[Box] = ()

    @property
    def buffer_nbytes(self) -> int:
        return 0 if self.straight else sum(place.num_bytes for place in self.theirs)

    def ours(self, buffer: torch.Tensor) -> Sequence[Place]:
        """buffer: uint8 [buffer_nbytes]"""
        if self.straight:
            return self.straight
        ends = list(accumulate(place.num_bytes for place in self.theirs))
        return [Place.of(buffer[start:end]) for start, end in pairwise([0, *ends])]

    def then(self, buffer: torch.Tensor) -> None:
        """The bytes have come."""
        if self.straight:
            return
        view = buffer.view(self.block_view)
        place = {block: at for at, block in enumerate(self.blocks)}
        for box in self.boxes:
            pairs = [
                (place[source], target)
                for source, target in zip(box.source.blocks, box.target.blocks, strict=True)
                if source in place
            ]
            for at, to, count in runs([at for at, _ in pairs], [to for _, to in pairs]):
                wanted = view[at : at + count, :, :, box.source.tokens, box.source.heads]
                self.target.corner(box.target, to, count).copy_(wanted)
        if buffer.is_cuda:
            torch.cuda.current_stream(buffer.device).synchronize()  # the next read into it asks no stream


def plan_reads(
    source: RemoteKv, part: Part, boxes: Sequence[Box], target: KvMemory, limit_nbytes: int
) -> list[Read]:
    """Each of at most limit_nbytes, or of one block. Raises TransferError if a block does not exist."""
    source.check(part.blocks)
    for box in boxes:
        for _, to, count in runs(box.source.blocks, box.target.blocks):
            target.corner(box.target, to, count)
    straight = [_goes_straight(source, box, target) for box in boxes]
    reads: list[Read] = []
    for box, is_straight in zip(boxes, straight, strict=True):
        if is_straight:
            reads += _straight_reads(source, box, target, limit_nbytes)

    def layers(box: Box) -> _Layers:
        return box.source.rank, box.source.layers.start, box.source.layers.stop

    others = sorted(
        (box for box, is_straight in zip(boxes, straight, strict=True) if not is_straight), key=layers
    )
    for (rank, start, stop), of_layers in groupby(others, key=layers):
        reads += _buffered_reads(source, rank, slice(start, stop), list(of_layers), target, limit_nbytes)
    return reads


def _goes_straight(source: RemoteKv, box: Box, target: KvMemory) -> bool:
    def is_whole(corner: Corner, layout: WorkerLayout) -> bool:
        rank = layout.rank(corner.rank)
        return corner.tokens == slice(0, rank.block_size) and corner.heads == slice(0, rank.num_kv_heads)

    return is_whole(box.source, source.layout) and is_whole(box.target, target.layout)


def _straight_reads(source: RemoteKv, box: Box, target: KvMemory, limit_nbytes: int) -> Iterator[Read]:
    theirs = _Blocks(source.layout, box.source.rank, source.ranks[box.source.rank], box.source.layers)
    ours = _Blocks(target.layout, box.target.rank, Place.of(target.ranks[box.target.rank]), box.target.layers)
    step = max(1, limit_nbytes // theirs.nbytes)
    for first in range(0, len(box.source.blocks), step):
        stretches = [
            stretch
            for at, to, count in runs(
                box.source.blocks[first : first + step], box.target.blocks[first : first + step]
            )
            for stretch in _joint(at, to, count, theirs.is_whole and ours.is_whole)
        ]
        yield Read(
            [theirs.place(at, count) for at, _, count in stretches],
            [ours.place(to, count) for _, to, count in stretches],
            target,
        )


def _buffered_reads(
    source: RemoteKv, rank: int, layers: slice, boxes: Sequence[Box], target: KvMemory, limit_nbytes: int
) -> Iterator[Read]:
    theirs = _Blocks(source.layout, rank, source.ranks[rank], layers)
    blocks = list(dict.fromkeys(block for box in boxes for block in box.source.blocks))
    step = max(1, limit_nbytes // theirs.nbytes)
    for first in range(0, len(blocks), step):
        some = blocks[first : first + step]
        places = [
            theirs.place(at, count)
            for first_block, n, num_blocks in runs(some, range(len(some)))
            for at, _, count in _joint(first_block, n, num_blocks, theirs.is_whole)
        ]
        yield Read(places, (), target, some, (len(some), *theirs.shape), boxes)


def _joint(at: int, to: int, count: int, is_joint: bool) -> list[tuple[int, int, int]]:
    """A stretch of blocks as one, or block by block."""
    return [(at, to, count)] if is_joint else [(at + i, to + i, 1) for i in range(count)]


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

    def place(self, block: int, count: int) -> Place:
        """Of `count` blocks from `block` on; one, unless these are all layers."""
        start = block * self._stride + self._offset
        nbytes = (count - 1) * self._stride + self.nbytes
        if not 0 <= start <= start + nbytes <= self._in.num_bytes:
            raise TransferError(f"block {block + count - 1} is offered; the worker's memory ends before it")
        return Place(self._in.address + start, nbytes, self._in.memory, self._in.device)
