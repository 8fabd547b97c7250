"""Shared memory between two real processes: other lives, dead peers, wrong announcements, no remains."""

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
import torch
from prelay.v1 import transfer_pb2

from transfer.base import KvMemory
from transfer.errors import SegmentError, StaleBlocksError
from transfer.host_id import host_id
from transfer.ipc import IpcBackend, SegmentRef, SharedSegment, map_memory
from transfer.layout import Part, Route, WorkerLayout

LAYOUT = WorkerLayout(num_layers=1, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32")
RANK = LAYOUT.rank(0)

PEER = """
import dataclasses, json, sys
from engine.layout import KvLayout
from transfer.ipc import SharedSegment

segment = SharedSegment.create(KvLayout(1, 2, 8, 4, "float32"), num_blocks=12, epoch=77)
for block in range(12):
    segment.blocks[block] = 10 + block
    segment.generations[block] = 100 + block
print(json.dumps(dataclasses.asdict(segment.ref)), flush=True)
sys.stdin.read()
"""


class Peer:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        self.ref = SegmentRef(**json.loads(self.process.stdout.readline()))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream
            stream.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    process = Peer()
    yield process
    process.kill()


@pytest.fixture
def ours() -> Iterator[SharedSegment]:
    segment = SharedSegment.create(RANK, num_blocks=8, epoch=1)
    yield segment
    segment.close()


def backend_of(segment: SharedSegment) -> IpcBackend:
    return IpcBackend(KvMemory(LAYOUT, (segment.blocks,), segment.generations), [segment])


def answer_of(ref: SegmentRef, epoch: int) -> transfer_pb2.Handshake:
    answer = transfer_pb2.Handshake(worker_id="p", epoch=epoch, host_id=ref.host_id)
    answer.ipc.ranks.add(pid=ref.pid, fd=ref.fd, num_bytes=ref.num_bytes)
    return answer


def test_blocks_are_copied_in_any_order(peer: Peer, ours: SharedSegment) -> None:
    route = Route(LAYOUT, LAYOUT)
    pull = backend_of(ours).connect(answer_of(peer.ref, 77), route)
    # Contiguous on both sides, on one side only, on neither, and backwards.
    blocks = (3, 4, 5, 9, 1, 0)
    part = Part(0, 24, 0, 1, blocks, tuple(100 + block for block in blocks))
    pull.pull(part, route.boxes(part, [2, 3, 4, 5, 7, 6]))
    assert ours.blocks[:, 0].tolist() == [0, 0, 13, 14, 15, 19, 10, 11]
    assert bool((ours.blocks == ours.blocks[:, :1]).all())
    pull.close()


def test_the_memory_of_a_killed_peer_can_still_be_read_but_not_opened(
    peer: Peer, ours: SharedSegment
) -> None:
    backend, route = backend_of(ours), Route(LAYOUT, LAYOUT)
    pull = backend.connect(answer_of(peer.ref, 77), route)
    peer.kill()
    part = Part(0, 4, 0, 1, (11,), (111,))
    pull.pull(part, route.boxes(part, [0]))
    assert ours.blocks[0, 0] == 21
    with pytest.raises(SegmentError, match="cannot be opened"):
        backend.connect(answer_of(peer.ref, 77), route)


def test_another_life_is_not_the_peer(peer: Peer) -> None:
    with pytest.raises(SegmentError, match="belongs to epoch 77 of the peer, 78 was expected"):
        map_memory(LAYOUT, [peer.ref], 78)


def test_another_host_is_not_this_one(peer: Peer, ours: SharedSegment) -> None:
    answer = answer_of(replace(peer.ref, host_id="elsewhere"), 77)
    assert not backend_of(ours).reaches(answer)
    with pytest.raises(SegmentError, match="on another host"):
        backend_of(ours).connect(answer, Route(LAYOUT, LAYOUT))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ref: replace(ref, fd=999), "cannot be opened"),
        (lambda ref: replace(ref, num_bytes=ref.num_bytes * 2), "is not shared memory of"),
        (lambda ref: replace(ref, num_bytes=ref.num_bytes // 2), "do not add up"),
        (lambda ref: replace(ref, num_bytes=10), "no room for a header"),
    ],
)
def test_a_wrong_announcement_is_refused(
    peer: Peer, change: Callable[[SegmentRef], SegmentRef], message: str
) -> None:
    with pytest.raises(SegmentError, match=message):
        map_memory(LAYOUT, [change(peer.ref)], 77)


def test_other_shared_memory_is_not_a_segment() -> None:
    fd = os.memfd_create("other")
    try:
        os.truncate(fd, 4096)
        with pytest.raises(SegmentError, match="is not a KV segment"):
            map_memory(LAYOUT, [SegmentRef(os.getpid(), fd, 4096, host_id())], 1)
    finally:
        os.close(fd)


def test_blocks_of_another_size_are_refused(peer: Peer) -> None:
    with pytest.raises(SegmentError, match="has blocks of 512 bytes, ours have 1024"):
        map_memory(replace(LAYOUT, num_layers=2), [peer.ref], 77)


def test_every_rank_has_a_segment_and_the_first_has_the_generations() -> None:
    layout = replace(LAYOUT, tp_size=2)
    segments = [SharedSegment.create(layout.rank(rank), 3, 5) for rank in range(2)]
    for rank, segment in enumerate(segments):
        segment.blocks[:] = 40 + rank
        segment.generations[:] = 7 + rank
    found = map_memory(layout, [segment.ref for segment in segments], 5)
    assert [int(rank[2, 0]) for rank in found.ranks] == [40, 41]
    assert found.generations.tolist() == [7, 7, 7]
    for segment in segments:
        segment.close()


def test_the_segment_is_closed_while_views_of_it_live(ours: SharedSegment) -> None:
    view = np.frombuffer(ours.data_buffer, np.uint8)
    found, ref = map_memory(LAYOUT, [ours.ref], 1), ours.ref
    ours.close()
    ours.close()
    view[:] = 7
    assert bool((found.ranks[0] == 7).all())
    with pytest.raises(SegmentError):
        map_memory(LAYOUT, [ref], 1)


def test_nothing_is_left_behind() -> None:
    def mapped() -> int:
        with open("/proc/self/maps", encoding="ascii") as maps:
            return sum("prelay-kv" in line for line in maps)

    gc.collect()
    before, files = mapped(), len(os.listdir("/proc/self/fd"))
    segment = SharedSegment.create(RANK, 4, 1)
    pull: Any = backend_of(segment).connect(answer_of(segment.ref, 1), Route(LAYOUT, LAYOUT))
    assert mapped() == before + 2
    pull.close()
    segment.close()
    del segment, pull
    gc.collect()
    assert mapped() == before
    assert len(os.listdir("/proc/self/fd")) <= files, "other tests may have left some to be collected"


def test_another_life_reopens_the_memory_and_what_was_copied_of_the_earlier_one_is_stale(
    ours: SharedSegment,
) -> None:
    theirs = SharedSegment.create(RANK, num_blocks=4, epoch=7)
    theirs.generations[:] = (5, 6, 7, 2**32 - 1)
    backend, route = backend_of(ours), Route(LAYOUT, LAYOUT)
    pull = backend.connect(answer_of(theirs.ref, 7), route)
    old = theirs.ref
    parts = [Part(0, 4, 0, 1, (block,), (int(theirs.generations[block]),)) for block in range(4)]
    pull.pull(parts[0], route.boxes(parts[0], [0]))
    theirs.close()
    theirs.reopen(8)
    for part in parts:
        with pytest.raises(StaleBlocksError):
            pull.pull(part, route.boxes(part, [0]))
    with pytest.raises(SegmentError):
        backend.connect(answer_of(replace(old, fd=theirs.ref.fd), 7), route)
    again = backend.connect(answer_of(theirs.ref, 8), route)
    theirs.blocks[2] = 9
    part = Part(0, 4, 0, 1, (2,), (8,))
    again.pull(part, route.boxes(part, [0]))
    assert ours.blocks[0, 0] == 9
    for one in (pull, again):
        one.close()
    theirs.close()


def test_data_begins_on_a_page_and_generations_do_not_overlap_it() -> None:
    segment = SharedSegment.create(RANK, 2000, 1)
    segment.blocks[:] = 0xAB
    assert not segment.generations.any()
    segment.generations[:] = 0xFFFFFFFF
    assert bool((segment.blocks == 0xAB).all())
    assert segment.data_buffer.nbytes == 2000 * RANK.block_nbytes
    assert segment.blocks.data_ptr() % 4096 == 0
    assert segment.blocks.dtype == torch.uint8
    segment.close()
