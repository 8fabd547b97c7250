"""Corners packed into messages: what backends do that cannot copy from one memory to the other in one go.

Both ends of a link pack alike, for that depends on the corners' shapes alone. Whether a message leaves from,
or arrives in, the KV itself or goes through a buffer is then each end's own affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from transfer.base import KvMemory, runs, tensor_of
from transfer.layout import Corner

Message: TypeAlias = Sequence[Corner]
"""Corners whose bytes follow one another."""

LIMIT_NBYTES = 4 << 20
"""Of a message, unless one block alone has more."""

_ALONE_NBYTES = 256 << 10
# Smaller corners share a message: an operation costs as much as copying this much.


def messages(memory: KvMemory, corners: Iterable[Corner]) -> Iterator[Message]:
    """All bytes of all corners, in order. A large corner is split between blocks."""
    shared: list[Corner] = []
    shared_nbytes = 0
    for corner in corners:
        for piece in _split(memory, corner):
            nbytes = memory.num_bytes(piece)
            if shared and (nbytes >= _ALONE_NBYTES or shared_nbytes + nbytes > LIMIT_NBYTES):
                yield shared
                shared, shared_nbytes = [], 0
            if nbytes >= _ALONE_NBYTES:
                yield [piece]
            else:
                shared.append(piece)
                shared_nbytes += nbytes
    if shared:
        yield shared


def num_bytes(memory: KvMemory, message: Message) -> int:
    return sum(memory.num_bytes(corner) for corner in message)


def in_place(memory: KvMemory, message: Message) -> torch.Tensor | None:
    """The very bytes, uint8 [num_bytes], if they lie in one piece. Raises what KvMemory.corner raises."""
    views = list(_views(memory, message))
    if len(views) == 1 and views[0].is_contiguous():
        return views[0].view(-1)
    return None


def gather(memory: KvMemory, message: Message, buffer: torch.Tensor) -> None:
    """Copy a message's bytes into `buffer`, uint8 [num_bytes]."""
    for view, part in _with_parts(memory, message, buffer):
        part.copy_(view)


def scatter(memory: KvMemory, message: Message, buffer: torch.Tensor) -> None:
    """The reverse of gather."""
    for view, part in _with_parts(memory, message, buffer):
        view.copy_(part)


class Slots:
    """Buffers in turn: message n uses the one of message n - count, which must be done by then."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(count)]

    def take(self, n: int, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes]"""
        at = n % len(self._buffers)
        if len(self._buffers[at]) < nbytes:
            self._buffers[at] = self._buffers[at].new_empty(nbytes)
        return self._buffers[at][:nbytes]


def _split(memory: KvMemory, corner: Corner) -> Iterator[Corner]:
    step = max(1, LIMIT_NBYTES * len(corner.blocks) // max(1, memory.num_bytes(corner)))
    for start in range(0, len(corner.blocks), step):
        yield replace(corner, blocks=corner.blocks[start : start + step])


def _views(memory: KvMemory, message: Message) -> Iterator[torch.Tensor]:
    for corner in message:
        for block, _, count in runs(corner.blocks, range(len(corner.blocks))):
            yield tensor_of(memory.corner(corner, block, count))


def _with_parts(
    memory: KvMemory, message: Message, buffer: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    start = 0
    for view in _views(memory, message):
        yield view, buffer[start : start + view.numel()].view(view.shape)
        start += view.numel()
