"""Backends between two processes, of which one is killed, stopped, replaced or just idle."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from transfer.base import Pull
from transfer.errors import PeerUnreachableError, StaleBlocksError
from transfer.layout import Part, Route

sys.path.insert(0, str(Path(__file__).parent))
from kv_peer import PeerProcess, Usage, Worker, layout, truth

SOURCE, TARGET = [3, 4, 5, 9, 1, 0], [8, 7, 1, 2, 3, 12]
NUM_TOKENS = 71
KINDS = ("ipc", "torchdist", "nixl", "nixl-tcp")
"""nixl-tcp: without the kernel's copy between processes of one host."""

StartPeer = Callable[[], PeerProcess]


class Ours(Worker):
    """The decode worker, in this process."""

    def connect(self, peer: PeerProcess, link: int = 1) -> tuple[Pull, Route]:
        route = Route(layout(), self.memory.layout)
        return self.backend.connect(peer.offer(link, self.handshake()), route), route

    def part(self, peer: PeerProcess) -> Part:  # type: ignore[override]
        blocks = tuple(SOURCE[:5])
        return Part(0, NUM_TOKENS, 0, 4, blocks, tuple(peer.generations[block] for block in blocks))

    def pull(self, peer: PeerProcess, pull: Pull, route: Route) -> None:
        part = self.part(peer)
        pull.pull(part, route.boxes(part, TARGET))

    def check(self) -> None:
        kv = truth(layout(), NUM_TOKENS)
        for layers, heads, found in self.read(NUM_TOKENS, TARGET):
            np.testing.assert_array_equal(found, kv[layers, :, :, heads])


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "nixl-tcp":
        monkeypatch.setenv("UCX_TLS", "tcp")
    return name


@pytest.fixture
def start_peer(kind: str) -> Iterator[StartPeer]:
    peers: list[PeerProcess] = []

    def start() -> PeerProcess:
        peers.append(PeerProcess(kind.split("-")[0], 16, NUM_TOKENS, SOURCE))
        return peers[-1]

    yield start
    for peer in peers:
        peer.kill()


@pytest.fixture
def ours(kind: str) -> Iterator[Ours]:
    worker = Ours(kind.split("-")[0], layout(tp=2), 16, {}, patience_s=1.5)
    yield worker
    worker.close()


def test_a_life_of_a_link(start_peer: StartPeer, ours: Ours) -> None:
    """Bytes, a recycled block, the same peer over a second link, and another life of it."""
    peer = start_peer()
    pull, route = ours.connect(peer)
    ours.pull(peer, pull, route)
    ours.check()
    peer.do("recycle 9")
    with pytest.raises(StaleBlocksError, match="block 9 has generation"):
        ours.pull(peer, pull, route)
    pull.close()
    peer.do("end 1")
    peer.generations[9] += 1
    pull, route = ours.connect(peer, link=2)
    ours.pull(peer, pull, route)
    pull.close()
    peer.kill()
    other = start_peer()
    pull, route = ours.connect(other)
    ours.pull(other, pull, route)
    ours.check()
    pull.close()


def test_a_peer_killed_while_idle_is_found_out_at_once(kind: str, start_peer: StartPeer, ours: Ours) -> None:
    peer = start_peer()
    pull, route = ours.connect(peer)
    ours.pull(peer, pull, route)
    peer.kill()
    if kind == "ipc":
        ours.pull(peer, pull, route)  # its memory outlives it
    else:
        with pytest.raises(PeerUnreachableError) as caught:
            ours.pull(peer, pull, route)
        assert "1.5 s" not in str(caught.value)
        assert "1500ms" not in str(caught.value)
        with pytest.raises(PeerUnreachableError):
            ours.pull(peer, pull, route)
    pull.close()


def test_a_peer_killed_in_the_middle_is_found_out_at_once(
    kind: str, start_peer: StartPeer, ours: Ours
) -> None:
    peer = start_peer()
    pull, route = ours.connect(peer)
    peer.process.send_signal(signal.SIGSTOP)
    killer = threading.Timer(0.3, peer.process.kill)
    killer.start()
    if kind in ("ipc", "nixl"):
        ours.pull(peer, pull, route)  # needs no help of the peer
        ours.check()
    else:
        with pytest.raises(PeerUnreachableError) as caught:
            ours.pull(peer, pull, route)
        assert "1.5 s" not in str(caught.value)
        assert "1500ms" not in str(caught.value)
    killer.join()
    pull.close()


@pytest.mark.slow
def test_a_stopped_peer_is_given_up_and_writes_nothing_later(kind: str, start_peer: StartPeer) -> None:
    # Equal layouts: what comes goes straight into the KV.
    ours = Ours(kind.split("-")[0], layout(), 16, {}, patience_s=1.5)
    peer = start_peer()
    pull, route = ours.connect(peer)
    peer.process.send_signal(signal.SIGSTOP)
    if kind in ("torchdist", "nixl-tcp"):
        with pytest.raises(PeerUnreachableError, match=r"1.5 s|1500ms"):
            ours.pull(peer, pull, route)
    for rank in ours.memory.ranks:
        rank.zero_()
    peer.process.send_signal(signal.SIGCONT)
    pull.close()
    pull, route = ours.connect(peer, link=2)
    part, others = ours.part(peer), [4, 5, 6, 9, 10]
    pull.pull(part, route.boxes(part, others))
    # What was under way would have come before this.
    assert ours.memory.ranks[0][others].any()
    assert not ours.memory.ranks[0][TARGET[:5]].any()
    pull.close()
    ours.close()


@pytest.mark.slow
def test_an_offer_that_ends_leaves_nothing_behind(kind: str, start_peer: StartPeer, ours: Ours) -> None:
    peer = start_peer()

    def link(number: int) -> None:
        """Ended by the puller, by the offerer, and before it began."""
        pull, route = ours.connect(peer, number)
        ours.pull(peer, pull, route)
        pull.close()
        peer.do(f"end {number}")
        pull, route = ours.connect(peer, number + 1)
        peer.do(f"end {number + 1}")
        if kind == "torchdist":
            with pytest.raises(PeerUnreachableError):
                ours.pull(peer, pull, route)
        pull.close()
        peer.offer(number + 2, ours.handshake())
        peer.do(f"end {number + 2}")

    def settled(usage: Callable[[], Usage], limit: Usage) -> Usage:
        """Threads and sockets end soon, not at once."""
        give_up_s = time.monotonic() + 20
        while ((now := usage()).threads > limit.threads or now.files > limit.files) and (
            time.monotonic() < give_up_s
        ):
            pass
        return now

    link(10)
    first = peer.usage(), Usage.now()
    for number in range(20, 100, 10):
        link(number)
    last = settled(peer.usage, first[0]), settled(Usage.now, first[1])
    for before, after in zip(first, last, strict=True):
        assert after.threads <= before.threads
        assert after.files <= before.files


@pytest.mark.slow
def test_idle_ends_use_no_cpu(start_peer: StartPeer, ours: Ours) -> None:
    peer = start_peer()
    pull, route = ours.connect(peer)
    ours.pull(peer, pull, route)
    time.sleep(1)
    before = peer.usage(), Usage.now()
    time.sleep(5)
    after = peer.usage(), Usage.now()
    for was, now in zip(before, after, strict=True):
        assert now.cpu_s - was.cpu_s < 0.02 * 5
    ours.pull(peer, pull, route)
    pull.close()
