"""What the puller asks the offerer for when bytes are sent to it: 64-bit numbers, checked before use.

number of blocks, the blocks whose generations follow the bytes
for each corner: rank, layers from, to, tokens from, to, heads from, to, number of blocks, the blocks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from transfer.base import KvMemory
from transfer.errors import TransferError
from transfer.layout import Corner

MAX_WORDS = 1 << 22
"""32 MiB: nobody asks for more in one go, and a length on the wire is not to be believed."""


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """blocks: those whose generations are wanted after the bytes of `corners`, which are sent in order."""

    blocks: tuple[int, ...]
    corners: tuple[Corner, ...]


def encode(request: ReadRequest) -> torch.Tensor:
    """int64 [n]. Raises TransferError if that is too long."""
    words = [len(request.blocks), *request.blocks]
    for corner in request.corners:
        for places in (corner.layers, corner.tokens, corner.heads):
            assert places.step is None
        words += [corner.rank, corner.layers.start, corner.layers.stop]
        words += [corner.tokens.start, corner.tokens.stop, corner.heads.start, corner.heads.stop]
        words += [len(corner.blocks), *corner.blocks]
    if len(words) > MAX_WORDS:
        raise TransferError(f"a read of {len(words)} numbers, {MAX_WORDS} are allowed: offer smaller parts")
    return torch.tensor(words, dtype=torch.int64)


def decode(words: torch.Tensor, memory: KvMemory) -> ReadRequest:
    """Raises TransferError if that is no request, or none for this memory."""
    rest: list[int] = words.tolist()
    at = 0

    def take(count: int) -> Sequence[int]:
        nonlocal at
        if not 0 <= count <= len(rest) - at:
            raise TransferError(f"a read request of {len(rest)} numbers ends at {at}, {count} more expected")
        at += count
        return rest[at - count : at]

    blocks = _checked_blocks(take(take(1)[0]), memory)
    corners: list[Corner] = []
    while at < len(rest):
        rank, *bounds, count = take(8)
        if not 0 <= rank < len(memory.ranks):
            raise TransferError(f"rank {rank} is asked for; the worker has {len(memory.ranks)}")
        layers, _, tokens, heads, _ = memory.layout.rank(rank).block_shape
        for size, start, stop in zip((layers, tokens, heads), bounds[::2], bounds[1::2], strict=True):
            if not 0 <= start < stop <= size:
                raise TransferError(
                    f"[{start}, {stop}) of a block's {size} layers, tokens or heads asked for"
                )
        places = [slice(start, stop) for start, stop in zip(bounds[::2], bounds[1::2], strict=True)]
        corners.append(Corner(rank, _checked_blocks(take(count), memory), *places))
    return ReadRequest(blocks, tuple(corners))


def check_blocks(blocks: Sequence[int], num_blocks: int) -> None:
    """Raises TransferError if a worker of so many blocks does not have one of these."""
    if blocks and not (min(blocks) >= 0 and max(blocks) < num_blocks):
        wrong = next(block for block in blocks if not 0 <= block < num_blocks)
        raise TransferError(f"block {wrong} is asked for; the worker has {num_blocks} blocks")


def _checked_blocks(blocks: Sequence[int], memory: KvMemory) -> tuple[int, ...]:
    check_blocks(blocks, len(memory.generations))
    return tuple(blocks)
