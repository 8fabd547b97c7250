"""Shared memory between two real processes: copies, staleness, other lives, dead peers, no remains."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.layout import KvLayout
from transfer.base import copy_blocks
from transfer.errors import SegmentError, StaleBlocksError, TransferError
from transfer.ipc import IpcBackend, SegmentRef, SharedSegment, host_id

LAYOUT = KvLayout(num_layers=1, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32")

PEER = """
import dataclasses, json, sys
from engine.layout import KvLayout
from transfer.ipc import SharedSegment

segment = SharedSegment.create(KvLayout(1, 2, 8, 4, "float32"), num_blocks=12, epoch=77)
for block in range(12):
    segment.blocks[block] = 10 + block
    segment.generations[block] = 100 + block
print(json.dumps(dataclasses.asdict(segment.ref)), flush=True)
for line in sys.stdin:
    block, fill = map(int, line.split())
    segment.generations[block] += 1
    segment.blocks[block] = fill
    print("done", flush=True)
"""


class Peer:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ref = SegmentRef(**json.loads(self._answer()))

    def recycle(self, block: int, fill: int) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{block} {fill}\n")
        self.process.stdin.flush()
        assert self._answer() == "done\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream
            stream.close()

    def _answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()


@pytest.fixture
def peer() -> Iterator[Peer]:
    process = Peer()
    yield process
    process.kill()


@pytest.fixture
def ours() -> Iterator[SharedSegment]:
    segment = SharedSegment.create(LAYOUT, num_blocks=8, epoch=1)
    yield segment
    segment.close()


def test_blocks_are_copied_in_any_order(peer: Peer, ours: SharedSegment) -> None:
    backend = IpcBackend(peer.ref, 77, ours)
    # Contiguous on both sides, on one side only, on neither, and backwards.
    backend.pull([3, 4, 5, 9, 1, 0], [103, 104, 105, 109, 101, 100], [2, 3, 4, 5, 7, 6])
    assert ours.blocks[:, 0].tolist() == [0, 0, 13, 14, 15, 19, 10, 11]
    assert (ours.blocks == ours.blocks[:, :1]).all()


def test_a_recycled_block_is_noticed(peer: Peer, ours: SharedSegment) -> None:
    backend = IpcBackend(peer.ref, 77, ours)
    peer.recycle(4, 255)
    with pytest.raises(
        StaleBlocksError, match="1 of 3 blocks were recycled: block 4 has generation 105, 104"
    ):
        backend.pull([3, 4, 5], [103, 104, 105], [0, 1, 2])
    backend.pull([3, 4, 5], [103, 105, 105], [0, 1, 2])
    assert ours.blocks[1].tolist() == [255] * LAYOUT.block_nbytes


def test_the_memory_of_a_killed_peer_can_still_be_read_but_not_opened(
    peer: Peer, ours: SharedSegment
) -> None:
    backend = IpcBackend(peer.ref, 77, ours)
    peer.kill()
    backend.pull([11], [111], [0])
    assert ours.blocks[0, 0] == 21
    with pytest.raises(SegmentError, match="cannot be opened"):
        IpcBackend(peer.ref, 77, ours)


def test_another_life_is_not_the_peer(peer: Peer, ours: SharedSegment) -> None:
    with pytest.raises(SegmentError, match="belongs to epoch 77 of the peer, 78 was expected"):
        IpcBackend(peer.ref, 78, ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ref: replace(ref, host_id="elsewhere"), "on another host"),
        (lambda ref: replace(ref, fd=999), "cannot be opened"),
        (lambda ref: replace(ref, num_bytes=ref.num_bytes * 2), "is not shared memory of"),
        (lambda ref: replace(ref, num_bytes=ref.num_bytes // 2), "do not add up"),
        (lambda ref: replace(ref, num_bytes=10), "no room for a header"),
    ],
)
def test_a_wrong_announcement_is_refused(
    peer: Peer, ours: SharedSegment, change: Callable[[SegmentRef], SegmentRef], message: str
) -> None:
    with pytest.raises(SegmentError, match=message):
        IpcBackend(change(peer.ref), 77, ours)


def test_other_shared_memory_is_not_a_segment(ours: SharedSegment) -> None:
    fd = os.memfd_create("other")
    try:
        os.truncate(fd, 4096)
        with pytest.raises(SegmentError, match="is not a KV segment"):
            IpcBackend(SegmentRef(os.getpid(), fd, 4096, host_id()), 1, ours)
    finally:
        os.close(fd)


def test_blocks_of_another_size_are_refused(peer: Peer) -> None:
    other = SharedSegment.create(replace(LAYOUT, num_layers=2), 4, 1)
    with pytest.raises(SegmentError, match="has blocks of 512 bytes, ours have 1024"):
        IpcBackend(peer.ref, 77, other)
    other.close()


def test_the_segment_is_closed_while_views_of_it_live(ours: SharedSegment) -> None:
    view = np.frombuffer(ours.data_buffer, np.uint8)
    reader = IpcBackend(ours.ref, 1, SharedSegment.create(LAYOUT, 2, 2))
    ref = ours.ref
    ours.close()
    ours.close()
    view[:] = 7
    reader.pull([0], [0], [0])
    with pytest.raises(SegmentError):
        IpcBackend(ref, 1, ours)


def test_nothing_is_left_behind() -> None:
    def mapped() -> int:
        with open("/proc/self/maps", encoding="ascii") as maps:
            return sum("prelay-kv" in line for line in maps)

    before, files = mapped(), len(os.listdir("/proc/self/fd"))
    segment = SharedSegment.create(LAYOUT, 4, 1)
    backend: Any = IpcBackend(segment.ref, 1, segment)
    assert mapped() == before + 2
    backend.close()
    segment.close()
    del segment, backend
    gc.collect()
    assert mapped() == before
    assert len(os.listdir("/proc/self/fd")) == files


def test_data_begins_on_a_page_and_generations_do_not_overlap_it() -> None:
    segment = SharedSegment.create(LAYOUT, 2000, 1)
    segment.blocks[:] = 0xAB
    assert not segment.generations.any()
    segment.generations[:] = 0xFFFFFFFF
    assert (segment.blocks == 0xAB).all()
    assert segment.data_buffer.nbytes == 2000 * LAYOUT.block_nbytes
    assert segment.blocks.ctypes.data % 4096 == 0
    segment.close()


def test_an_offer_of_blocks_that_do_not_exist_is_refused() -> None:
    blocks, generations = np.zeros((4, 8), np.uint8), np.zeros(4, np.uint32)
    with pytest.raises(TransferError, match="block 4"):
        copy_blocks(blocks, generations, [3, 4], [0, 0], np.zeros((4, 8), np.uint8), [0, 1])
