"""What every backend must do: the very bytes between any two layouts, or an error that says why."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prelay.v1 import transfer_pb2

from transfer.backends import BEST_FIRST, make_backends
from transfer.base import KvMemory, Pull
from transfer.digest import check_digests, digests_of
from transfer.errors import (
    BackendMissingError,
    DigestError,
    PeerUnreachableError,
    StaleBlocksError,
    TransferError,
)
from transfer.layout import Route
from transfer.memory import MemoryBackend, Pace

sys.path.insert(0, str(Path(__file__).parent))
from kv_peer import NAMES, Worker, layout, truth

MakeWorker = Callable[..., Worker]
# Runs, single blocks, and a step back, so that blocks are contiguous on one side, on both and on neither.
SOURCE, TARGET = [3, 4, 5, 9, 1, 0], [8, 7, 1, 2, 3, 12]


@pytest.fixture(params=NAMES)
def make(request: pytest.FixtureRequest) -> Iterator[MakeWorker]:
    """Workers that have this backend, as many as are wanted."""
    workers: list[Worker] = []
    peers: dict[str, KvMemory] = {}

    def make(**kwargs: Any) -> Worker:
        workers.append(Worker(request.param, layout(**kwargs), 16, peers))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def connect(source: Worker, target: Worker, link: int = 1) -> tuple[Pull, Route]:
    route = Route(source.memory.layout, target.memory.layout)
    return target.backend.connect(source.offer(link, target.handshake()), route), route


def snapshot(worker: Worker) -> list[np.ndarray]:
    return [rank.numpy().copy() for rank in worker.memory.ranks]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ({}, {}),
        ({"tp": 2}, {"tp": 2}),
        ({"tp": 2}, {}),
        ({}, {"tp": 2}),
        ({"tp": 4, "heads": 2}, {"tp": 2, "heads": 2}),
        ({"tp": 2, "heads": 2}, {"tp": 8, "heads": 2}),
        ({"pp": 2}, {}),
        ({"pp": 2, "tp": 2}, {"pp": 4}),
        ({"block_size": 32}, {}),
        ({}, {"block_size": 32}),
        ({"block_size": 32, "tp": 2}, {"pp": 2}),
    ],
)
@pytest.mark.parametrize("num_tokens", [80, 71])
def test_every_rank_gets_its_share(make: MakeWorker, source: Any, target: Any, num_tokens: int) -> None:
    theirs, ours = make(**source), make(**target)
    kv = truth(theirs.memory.layout, num_tokens)
    theirs.write(kv, SOURCE)
    pull, route = connect(theirs, ours)
    part = theirs.part(0, num_tokens, SOURCE)
    pull.pull(part, route.boxes(part, TARGET))
    for layers, heads, found in ours.read(num_tokens, TARGET):
        np.testing.assert_array_equal(found, kv[layers, :, :, heads])
    pull.close()


def test_chunks_and_layer_groups_come_one_by_one_and_a_cached_prefix_not_at_all(make: MakeWorker) -> None:
    theirs, ours = make(block_size=32), make(tp=2)
    kv = truth(theirs.memory.layout, 71)
    theirs.write(kv, SOURCE)
    noise = ours.read(32, TARGET)
    pull, route = connect(theirs, ours)
    for start, end in [(0, 64), (64, 71)]:
        for layers in [(0, 1), (1, 4)]:
            part = theirs.part(start, end, SOURCE, layers)
            pull.pull(part, route.boxes(part, TARGET, skip_tokens=32))
    for (layers, heads, found), (_, _, before) in zip(ours.read(71, TARGET), noise, strict=True):
        np.testing.assert_array_equal(found[:, :, 32:], kv[layers, :, 32:, heads])
        np.testing.assert_array_equal(found[:, :, :32], before)
    pull.close()


def test_other_blocks_are_left_alone(make: MakeWorker) -> None:
    theirs, ours = make(), make(tp=2)
    pull, route = connect(theirs, ours)
    before = snapshot(ours)
    part = theirs.part(0, 80, SOURCE)
    pull.pull(part, route.boxes(part, TARGET))
    others = [block for block in range(16) if block not in TARGET[:5]]
    for rank, was in zip(ours.memory.ranks, before, strict=True):
        np.testing.assert_array_equal(rank.numpy()[others], was[others])
    pull.close()


@pytest.mark.parametrize("target", [{}, {"tp": 2}])
def test_a_recycled_block_is_noticed_and_the_next_copy_is_good(make: MakeWorker, target: Any) -> None:
    theirs, ours = make(), make(**target)
    pull, route = connect(theirs, ours)
    part = theirs.part(0, 71, SOURCE)
    theirs.memory.generations[9] = 3
    with pytest.raises(StaleBlocksError, match="1 of 5 blocks were recycled: block 9 has generation 3"):
        pull.pull(part, route.boxes(part, TARGET))
    part = theirs.part(0, 71, SOURCE)
    pull.pull(part, route.boxes(part, TARGET))
    pull.close()


def test_a_recycled_block_is_noticed_even_if_all_of_it_is_cached(make: MakeWorker) -> None:
    theirs, ours = make(), make()
    pull, route = connect(theirs, ours)
    part = theirs.part(0, 16, SOURCE)
    theirs.memory.generations[3] += 1
    boxes = route.boxes(part, TARGET, skip_tokens=16)
    assert not boxes
    with pytest.raises(StaleBlocksError):
        pull.pull(part, boxes)
    pull.close()


@pytest.mark.parametrize("target", [{}, {"tp": 2}])
def test_blocks_that_do_not_exist_are_refused_and_nothing_else_breaks(make: MakeWorker, target: Any) -> None:
    theirs, ours = make(), make(**target)
    kv = truth(theirs.memory.layout, 80)
    theirs.write(kv, SOURCE)
    pull, route = connect(theirs, ours)
    part = theirs.part(0, 80, SOURCE)
    for wrong in (16, 2**31):
        other = replace(part, blocks=(wrong, *part.blocks[1:]))
        with pytest.raises(TransferError, match=f"block {wrong}") as caught:
            pull.pull(other, route.boxes(other, TARGET))
        assert not isinstance(caught.value, PeerUnreachableError | StaleBlocksError)
    with pytest.raises(TransferError, match="block 99"):
        pull.pull(part, route.boxes(part, [99, *TARGET[1:]]))
    pull.pull(part, route.boxes(part, TARGET))
    for layers, heads, found in ours.read(80, TARGET):
        np.testing.assert_array_equal(found, kv[layers, :, :, heads])
    pull.close()


def test_a_request_that_torchdist_cannot_serve_ends_its_connection_and_no_other() -> None:
    peers: dict[str, KvMemory] = {}
    theirs, ours = (Worker("torchdist", layout(), 16, peers) for _ in range(2))
    answer = theirs.offer(1, ours.handshake())
    answer.torchdist.num_blocks += 1  # else it would not be sent
    route = Route(layout(), layout())
    wrong = ours.backend.connect(answer, route)
    other, _ = connect(theirs, ours, 2)
    part = theirs.part(0, 80, SOURCE)
    before = snapshot(ours)
    beyond = replace(part, blocks=(16, *part.blocks[1:]))
    for asked in (beyond, part):
        with pytest.raises(PeerUnreachableError) as caught:
            wrong.pull(asked, route.boxes(asked, TARGET))
        assert "Timed out" not in str(caught.value)
    np.testing.assert_array_equal(snapshot(ours), before)
    other.pull(part, route.boxes(part, TARGET))
    np.testing.assert_array_equal(ours.memory.ranks[0][TARGET[:5]], theirs.memory.ranks[0][SOURCE[:5]])
    for worker in (ours, theirs):
        worker.close()


def test_one_worker_serves_several_links_and_pulls_as_well(make: MakeWorker) -> None:
    a, b, c = make(), make(), make(tp=2)
    kv = truth(a.memory.layout, 71)
    a.write(kv, SOURCE)
    links = [(ours, *connect(a, ours, link)) for link, ours in enumerate((b, c, b))]
    part = a.part(0, 71, SOURCE)
    for ours, pull, route in reversed(links):
        pull.pull(part, route.boxes(part, TARGET))
        for layers, heads, found in ours.read(71, TARGET):
            np.testing.assert_array_equal(found, kv[layers, :, :, heads])
    back, route = connect(b, a)
    part = b.part(0, 71, TARGET)
    back.pull(part, route.boxes(part, [10, 11, 12, 13, 14]))
    np.testing.assert_array_equal(a.read(71, [10, 11, 12, 13, 14])[0][2], kv)
    links[0][1].close()  # two links to the same peer are not one
    part = a.part(0, 71, SOURCE)
    links[2][1].pull(part, links[2][2].boxes(part, TARGET))
    for pull in (back, links[1][1], links[2][1]):
        pull.close()


def test_offers_end_without_a_puller_and_twice(make: MakeWorker) -> None:
    worker = make()
    worker.offer(1, worker.handshake())
    worker.offer(2, worker.handshake())
    worker.backend.end_offer(1)
    worker.backend.end_offer(1)
    worker.backend.end_offer(3)


def test_an_answer_of_other_ranks_is_refused(make: MakeWorker) -> None:
    theirs, ours = make(tp=2), make()
    if theirs.backend.name not in ("ipc", "nixl"):
        return  # the others' endpoints do not list ranks
    answer = theirs.offer(1, ours.handshake())
    with pytest.raises(TransferError, match="ranks"):
        ours.backend.connect(answer, Route(layout(), layout()))


def test_a_copy_in_memory_takes_its_time_and_can_be_spoilt() -> None:
    peers: dict[str, KvMemory] = {}
    theirs, ours = (Worker("memory", layout(), 16, peers) for _ in range(2))
    slept: list[float] = []
    backend = MemoryBackend(
        ours.memory,
        peers,
        after_copy=lambda part: ours.memory.ranks[0][TARGET[0]].zero_(),
        pace=Pace(delay_s=2.0, bytes_per_s=4 * layout().rank(0).block_nbytes, sleep=slept.append),
    )
    route = Route(layout(), layout())
    pull = backend.connect(theirs.handshake(), route)
    part = theirs.part(0, 96, SOURCE)
    part = replace(part, digests=digests_of(theirs.memory, route, part))
    boxes = route.boxes(part, TARGET)
    pull.pull(part, boxes)
    assert slept == [2.0 + 6 / 4]
    with pytest.raises(DigestError, match="block 8 holds other bytes"):
        check_digests(ours.memory, route, part, boxes)
    del peers["w0"]  # it dies
    with pytest.raises(PeerUnreachableError, match="w0 is gone"):
        pull.pull(part, boxes)


@pytest.mark.parametrize("target", [{}, {"tp": 2, "block_size": 32}])
def test_digests_agree_on_what_every_backend_brings(make: MakeWorker, target: Any) -> None:
    theirs, ours = make(pp=2), make(**target)
    theirs.write(truth(theirs.memory.layout, 96), SOURCE)
    pull, route = connect(theirs, ours)
    part = theirs.part(0, 96, SOURCE)
    part = replace(part, digests=digests_of(theirs.memory, route, part))
    boxes = route.boxes(part, TARGET, skip_tokens=32)
    pull.pull(part, boxes)
    check_digests(ours.memory, route, part, boxes)
    ours.memory.ranks[0][TARGET[2], 0] ^= 1
    with pytest.raises(DigestError):
        check_digests(ours.memory, route, part, route.boxes(part, TARGET))
    pull.close()


def one_worker() -> Worker:
    return Worker("memory", layout(), 16, {})


def test_auto_takes_what_is_here_best_first() -> None:
    worker = one_worker()
    backends = make_backends("auto", worker.memory, worker.segments, "127.0.0.1", "a")
    assert [backend.name for backend in backends] == list(BEST_FIRST) == ["ipc", "nixl", "torchdist"]
    elsewhere = transfer_pb2.Handshake(host_id="elsewhere")
    assert [backend.reaches(worker.handshake()) for backend in backends] == [True, True, True]
    # Nor can another host reach a loopback address.
    assert [backend.reaches(elsewhere) for backend in backends] == [False, True, False]
    for backend in backends:
        backend.close()


def test_a_missing_backend_is_left_out_of_auto_and_an_error_if_configured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = one_worker()
    monkeypatch.setitem(sys.modules, "nixl._bindings", None)  # as if it was not installed
    backends = make_backends("auto", worker.memory, worker.segments, "127.0.0.1", "a")
    assert [backend.name for backend in backends] == ["ipc", "torchdist"]
    with pytest.raises(BackendMissingError, match=r"pip install 'prelay\[nixl\]'"):
        make_backends("nixl", worker.memory, worker.segments, "127.0.0.1", "a")
    for backend in backends:
        backend.close()
    worker.close()


@pytest.mark.parametrize("name", BEST_FIRST)
def test_a_configured_backend_is_the_only_one(name: str) -> None:
    worker = one_worker()
    [backend] = make_backends(name, worker.memory, worker.segments, "127.0.0.1", "a")
    assert backend.name == name
    backend.close()
    worker.close()


def test_an_unknown_backend_is_an_error() -> None:
    worker = one_worker()
    with pytest.raises(BackendMissingError, match="'mooncake' is not known"):
        make_backends("mooncake", worker.memory, worker.segments, "127.0.0.1", "a")
    worker.close()
