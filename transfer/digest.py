"""A cheap check of what a hand-off brought: CRC-32 of every piece, worked out on both sides.

It finds what the generations cannot: a backend or a network that delivers other bytes than it read, and a map
between layouts that is wrong. It is no defence against somebody who wants to deceive.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from transfer.base import Blocks, KvMemory, array_of, on_cuda, tensor_of
from transfer.errors import DigestError
from transfer.layout import Box, Part, Route


def digests_of(memory: KvMemory, route: Route, part: Part) -> tuple[int, ...]:
    """Of a part that is to be offered: the offerer's half. 0 where a slice has none of the part's layers."""
    num_pieces = len(route.pieces(part.start_token, part.end_token))
    # Where it goes does not matter here.
    table = range(part.end_token // route.target.block_size + 1)
    digests = [0] * (num_pieces * len(route.slices))
    for box in route.boxes(part, table):
        crcs = (_crc(memory.corner(box.source, block, 1)) for block in box.source.blocks)
        for at, crc in zip(_places(route, box), crcs, strict=True):
            digests[at] = crc
    return tuple(digests)


def check_digests(memory: KvMemory, route: Route, part: Part, boxes: Sequence[Box]) -> None:
    """The puller's half, after the copy. Raises DigestError at the first difference."""
    for box in boxes:
        for at, block in zip(_places(route, box), box.target.blocks, strict=True):
            found = _crc(memory.corner(box.target, block, 1))
            if at >= len(part.digests) or found != part.digests[at]:
                raise DigestError(
                    f"block {block} holds other bytes than were offered for tokens "
                    f"{part.start_token} to {part.end_token - 1}"
                )


def _places(route: Route, box: Box) -> Iterable[int]:
    return (piece * len(route.slices) + box.slice_index for piece in box.pieces)


def _crc(view: Blocks) -> int:
    array = array_of(tensor_of(view).cpu() if on_cuda(view) else view)
    return zlib.crc32(np.ascontiguousarray(array).data)
