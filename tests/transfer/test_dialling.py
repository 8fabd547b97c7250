"""Whom a decode worker dials, when again, and what routers hear of it."""

from __future__ import annotations

import pytest

from transfer.dialling import FIRST_BACKOFF_S, MAX_BACKOFF_S, Dialling
from transfer.handoff import Connect, Disconnect, HandoffFailure, PairChanged, Peer

PEER, SUCCESSOR = Peer("prefill-0", 7), Peer("prefill-0", 8)
CONNECT = Connect(PEER, "host:1")
UNREACHABLE, MISMATCH = HandoffFailure.PEER_UNREACHABLE, HandoffFailure.PEER_MISMATCH
LINKED = PairChanged(PEER, None, "ipc")


def dialling() -> Dialling:
    made = Dialling()
    assert made.want(PEER, "host:1", 0.0) == [CONNECT]
    return made


def up() -> Dialling:
    """On link 1."""
    made = dialling()
    assert made.linked(1, PEER, "ipc") == [LINKED]
    return made


def waiting() -> Dialling:
    """Until FIRST_BACKOFF_S."""
    made = dialling()
    assert made.failed(PEER, UNREACHABLE, "down", 0.0) == [PairChanged(PEER, UNREACHABLE, "down")]
    return made


def refused() -> Dialling:
    made = dialling()
    assert made.failed(PEER, MISMATCH, "dtype", 0.0) == [PairChanged(PEER, MISMATCH, "dtype")]
    return made


def test_a_link_is_known_until_it_is_lost_and_then_dialled_at_once() -> None:
    made = up()
    assert made.link_of(PEER) == 1
    assert made.is_up(1)
    assert made.deadline() is None
    peer, (told,) = made.lost(1, 5.0)
    assert peer == PEER
    assert isinstance(told, PairChanged)
    assert told.reason is UNREACHABLE
    assert made.link_of(PEER) is None
    assert not made.is_up(1)
    assert made.lost(1, 5.0) == (None, [])
    assert made.deadline() == 5.0
    assert made.tick(5.0) == [CONNECT]
    assert made.tick(5.0) == []


def test_the_backoff_doubles_up_to_its_maximum_and_starts_anew_after_a_link() -> None:
    made, now, waits = dialling(), 0.0, []
    for _ in range(8):
        made.failed(PEER, UNREACHABLE, "down", now)
        deadline = made.deadline()
        assert deadline is not None
        assert made.tick(deadline - 0.01) == []
        assert made.tick(deadline) == [CONNECT]
        waits.append(deadline - now)
        now = deadline
    wanted = [min(FIRST_BACKOFF_S * 2**i, MAX_BACKOFF_S) for i in range(8)]
    assert waits == pytest.approx(wanted)
    made.linked(1, PEER, "ipc")
    made.lost(1, now)
    assert made.tick(now) == [CONNECT]
    made.failed(PEER, UNREACHABLE, "down", now)
    assert made.deadline() == now + FIRST_BACKOFF_S


def test_routers_hear_of_changes_once() -> None:
    made = waiting()
    made.tick(1.0)
    assert made.failed(PEER, UNREACHABLE, "still down", 1.0) == [], "nothing has changed"
    made.tick(2.0)
    assert made.failed(PEER, MISMATCH, "dtype", 2.0) == [PairChanged(PEER, MISMATCH, "dtype")]


def test_who_asks_for_a_known_pair_hears_how_it_stands() -> None:
    assert dialling().want(PEER, "host:1", 1.0) == [], "it will be told"
    assert up().want(PEER, "host:1", 1.0) == [LINKED]
    assert waiting().want(PEER, "host:1", 0.0) == [PairChanged(PEER, UNREACHABLE, "down")]
    assert refused().want(PEER, "host:1", 1.0) == [PairChanged(PEER, MISMATCH, "dtype")]


def test_a_request_does_not_wait_for_the_next_attempt() -> None:
    assert dialling().want(PEER, "host:1", 0.0, at_once=True) == []
    for made in (waiting(), refused()):
        assert made.want(PEER, "host:1", 0.0, at_once=True) == [CONNECT]
        assert made.tick(MAX_BACKOFF_S) == [], "one at a time"


def test_a_mismatch_is_not_dialled_again() -> None:
    made = refused()
    assert made.deadline() is None
    assert made.tick(1000.0) == []
    made.forget(PEER)
    assert made.want(PEER, "host:1", 1000.0) == [CONNECT]


def test_forget_is_legal_in_every_state() -> None:
    assert Dialling().forget(PEER) == (None, [])
    assert dialling().forget(PEER) == (None, [])
    assert waiting().forget(PEER) == (None, [])
    assert refused().forget(PEER) == (None, [])
    made = up()
    assert made.forget(SUCCESSOR) == (None, [])
    assert made.forget(PEER) == (1, [Disconnect(1)])
    assert made.forget(PEER) == (None, [])
    assert made.lost(1, 1.0) == (None, []), "that it is closed is known"
    assert made.deadline() is None


def test_what_was_forgotten_while_it_was_dialled_is_closed() -> None:
    made = dialling()
    made.forget(PEER)
    assert made.linked(1, PEER, "ipc") == [Disconnect(1)]
    assert made.link_of(PEER) is None
    made = dialling()
    made.forget(PEER)
    assert made.failed(PEER, UNREACHABLE, "down", 0.0) == []
    assert made.deadline() is None
    assert made.linked(1, PEER, "ipc") == [Disconnect(1)]


@pytest.mark.parametrize("at_once", [False, True])
def test_a_peer_is_never_dialled_twice_at_the_same_time(at_once: bool) -> None:
    """The second link would end the first, and the requests on it."""
    made = dialling()
    made.forget(PEER)
    assert made.want(PEER, "host:1", 0.1, at_once=at_once) == []
    assert made.linked(1, PEER, "ipc") == [LINKED]
    assert made.failed(PEER, UNREACHABLE, "late news", 0.2) == []
    assert made.link_of(PEER) == 1
    assert made.deadline() is None


def test_a_peer_that_only_a_request_wanted_is_not_kept() -> None:
    made = Dialling()
    assert made.want(PEER, "host:1", 0.0, at_once=True) == [CONNECT]
    assert made.failed(PEER, UNREACHABLE, "down", 0.0) == []
    assert made.deadline() is None
    assert made.want(PEER, "host:1", 0.0, at_once=True) == [CONNECT]
    made.linked(1, PEER, "ipc")
    assert made.lost(1, 1.0) == (PEER, [])
    assert made.deadline() is None


def test_a_peer_that_a_request_wanted_first_and_a_pair_then_is_kept() -> None:
    made = Dialling()
    made.want(PEER, "host:1", 0.0, at_once=True)
    assert made.want(PEER, "host:1", 0.0) == []
    made.failed(PEER, UNREACHABLE, "down", 0.0)
    assert made.deadline() == FIRST_BACKOFF_S


def test_a_successor_is_another_peer() -> None:
    made = up()
    assert made.want(SUCCESSOR, "host:2", 1.0) == [Connect(SUCCESSOR, "host:2")]
    made.forget(PEER)
    assert made.linked(2, SUCCESSOR, "ipc") == [PairChanged(SUCCESSOR, None, "ipc")]
    assert made.link_of(SUCCESSOR) == 2
