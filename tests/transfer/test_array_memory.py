"""KV in arrays, as simulated workers have it, moves through ipc as tensors do, and by no other way."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from engine.layout import KvLayout
from transfer.base import KvMemory, copy_boxes
from transfer.digest import check_digests, digests_of
from transfer.errors import DigestError, TransferError
from transfer.ipc import SharedSegment
from transfer.layout import Part, Route, WorkerLayout

LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32")
WORKER = WorkerLayout.of(LAYOUT)
ROUTE = Route(WORKER, WORKER)
PART = Part(0, 12, 0, 2, blocks=(3, 1, 4), generations=(0, 0, 0))
TARGET = (0, 5, 2)


@pytest.fixture
def segments() -> Iterator[list[SharedSegment]]:
    made = [SharedSegment.create(LAYOUT, 6, epoch=1) for _ in range(2)]
    made[0].array[:] = np.frombuffer(random.Random(0).randbytes(made[0].array.size), np.uint8).reshape(6, -1)
    yield made
    for segment in made:
        segment.close()


def arrays_of(segment: SharedSegment) -> KvMemory:
    return KvMemory(WORKER, (segment.array,), segment.generations)


def tensors_of(segment: SharedSegment) -> KvMemory:
    return KvMemory(WORKER, (segment.blocks,), segment.generations)


def test_arrays_are_copied_and_checked_like_tensors(segments: list[SharedSegment]) -> None:
    source, target = segments
    part = Part(0, 12, 0, 2, PART.blocks, PART.generations, digests_of(arrays_of(source), ROUTE, PART))
    assert part.digests == digests_of(tensors_of(source), ROUTE, PART)
    assert len(set(part.digests)) > 1
    boxes = ROUTE.boxes(part, TARGET)
    copy_boxes(arrays_of(source), part, boxes, arrays_of(target))
    np.testing.assert_array_equal(target.array[list(TARGET)], source.array[list(PART.blocks)])
    check_digests(arrays_of(target), ROUTE, part, boxes)
    target.array[TARGET[1], 0] ^= 1
    with pytest.raises(DigestError):
        check_digests(arrays_of(target), ROUTE, part, boxes)


def test_arrays_are_no_tensors(segments: list[SharedSegment]) -> None:
    assert tensors_of(segments[0]).tensors[0].shape == segments[0].array.shape
    with pytest.raises(TransferError, match="simulated worker moves through ipc only"):
        _ = arrays_of(segments[0]).tensors
