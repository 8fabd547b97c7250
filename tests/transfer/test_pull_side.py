"""The decode worker's half, event by event: what it answers in each state, and what it ignores."""

from __future__ import annotations

import pytest

from engine.sequence import RequestKey
from transfer.errors import HandoffError
from transfer.handoff import (
    ConfirmReserved,
    Connect,
    Deliver,
    Fail,
    Fetch,
    Free,
    HandoffFailure,
    Offered,
    Peer,
    SendAcknowledge,
    SendDrop,
)
from transfer.pull_side import PullSide, PullState

KEY = RequestKey("a", 0)
PEER = Peer("prefill-0", 7)
BLOCKS = (5, 6, 7)
OFFER = Offered(KEY, 6, 99, (1, 2), (10, 11))
LEASE_S = 8.0


def in_state(state: PullState) -> PullSide:
    """KEY in the given state, on link 1 if it has one, reached at time 0."""
    side = PullSide(LEASE_S)
    assert side.reserve(KEY, PEER, "host:1", 6, 2, BLOCKS, 0.0) == [Connect(PEER, "host:1")]
    if state is not PullState.CONNECTING:
        assert side.link_up(1, PEER, 0.0) == [ConfirmReserved(KEY)]
    if state in (PullState.FETCHING, PullState.DISCARDING):
        assert side.offered(1, OFFER, 0.0) == [Fetch(1, OFFER, (5, 6))]
    if state is PullState.DISCARDING:
        assert side.cancel(KEY) == []
    assert side.counts()[state] == 1
    return side


def test_one_link_serves_all_requests_of_a_pair() -> None:
    side = in_state(PullState.CONNECTING)
    second, third = RequestKey("b", 0), RequestKey("c", 0)
    assert side.reserve(second, PEER, "host:1", 6, 2, [1], 0.0) == []
    assert side.link_up(1, PEER, 0.0) == [ConfirmReserved(KEY), ConfirmReserved(second)]
    assert side.reserve(third, PEER, "host:1", 6, 2, [2], 0.0) == [ConfirmReserved(third)]


def test_a_good_copy_is_acknowledged_and_delivered() -> None:
    side = in_state(PullState.FETCHING)
    assert side.fetched(KEY, 2.5) == [SendAcknowledge(1, KEY), Deliver(KEY, BLOCKS, 99, 2.5, 2.5)]
    assert side.num_blocks == 0


def test_a_failed_copy_fails_the_request() -> None:
    side = in_state(PullState.FETCHING)
    assert side.fetch_failed(KEY, "stale") == [
        Fail(KEY, HandoffFailure.TRANSFER_FAILED, "stale"),
        Free(KEY, BLOCKS),
        SendDrop(1, KEY),
    ]


def test_a_link_that_cannot_be_made_fails_who_waits_for_it() -> None:
    side = in_state(PullState.CONNECTING)
    assert side.link_failed(Peer("prefill-0", 8), HandoffFailure.PEER_MISMATCH, "dtype") == []
    assert side.link_failed(PEER, HandoffFailure.PEER_MISMATCH, "dtype") == [
        Fail(KEY, HandoffFailure.PEER_MISMATCH, "dtype"),
        Free(KEY, BLOCKS),
    ]


@pytest.mark.parametrize(
    ("state", "answer"),
    [
        (PullState.CONNECTING, [Free(KEY, BLOCKS)]),
        (PullState.RESERVED, [Free(KEY, BLOCKS), SendDrop(1, KEY)]),
        (PullState.FETCHING, []),
        (PullState.DISCARDING, []),
    ],
)
def test_cancel(state: PullState, answer: list[object]) -> None:
    side = in_state(state)
    assert side.cancel(RequestKey("a", 1)) == []
    assert side.cancel(KEY) == answer
    if not answer:
        assert side.counts()[PullState.DISCARDING] == 1
    assert side.cancel(KEY) == []


@pytest.mark.parametrize("copy", ["fetched", "fetch_failed"])
def test_a_discarded_copy_frees_only_when_it_ends(copy: str) -> None:
    side = in_state(PullState.DISCARDING)
    end = side.fetched(KEY, 1.0) if copy == "fetched" else side.fetch_failed(KEY, "stale")
    assert end == [Free(KEY, BLOCKS), SendDrop(1, KEY)]


def test_withdraw_is_answered_with_drop() -> None:
    assert in_state(PullState.RESERVED).withdrawn(1, KEY) == [Free(KEY, BLOCKS), SendDrop(1, KEY)]
    side = in_state(PullState.FETCHING)
    assert side.withdrawn(2, KEY) == [SendDrop(2, KEY)]
    assert side.counts()[PullState.FETCHING] == 1
    assert side.withdrawn(1, KEY) == []
    assert side.fetched(KEY, 1.0) == [Free(KEY, BLOCKS), SendDrop(1, KEY)]
    assert side.withdrawn(1, KEY) == [SendDrop(1, KEY)]


def test_an_offer_that_nobody_waits_for_is_dropped() -> None:
    side = in_state(PullState.RESERVED)
    stranger = Offered(RequestKey("a", 1), 6, 99, (1, 2), (10, 11))
    assert side.offered(1, stranger, 0.0) == [SendDrop(1, stranger.key)]
    assert side.offered(2, OFFER, 0.0) == [SendDrop(2, KEY)], "reserved over another link"
    assert side.counts()[PullState.RESERVED] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        Offered(KEY, 7, 99, (1, 2), (10, 11)),
        Offered(KEY, 6, 99, (1, 2, 3), (10, 11, 12)),
        Offered(KEY, 6, 99, (1, 2), (10,)),
    ],
)
def test_an_offer_that_does_not_fit_fails_the_request(wrong: Offered) -> None:
    fail, free, drop = in_state(PullState.RESERVED).offered(1, wrong, 0.0)
    assert isinstance(fail, Fail)
    assert fail.reason is HandoffFailure.TRANSFER_FAILED
    assert (free, drop) == (Free(KEY, BLOCKS), SendDrop(1, KEY))


def test_a_lost_link_fails_what_was_only_reserved() -> None:
    side = in_state(PullState.RESERVED)
    assert side.link_lost(2) == []
    fail, free = side.link_lost(1)
    assert isinstance(fail, Fail)
    assert fail.reason is HandoffFailure.PEER_UNREACHABLE
    assert free == Free(KEY, BLOCKS)


def test_a_link_lost_under_the_copy_leaves_the_verdict_to_the_generations() -> None:
    side = in_state(PullState.FETCHING)
    assert side.link_lost(1) == []
    assert side.fetched(KEY, 1.0) == [Deliver(KEY, BLOCKS, 99, 1.0, 1.0)]
    side = in_state(PullState.FETCHING)
    assert side.link_lost(1) == []
    assert [type(action) for action in side.fetch_failed(KEY, "stale")] == [Fail, Free]


@pytest.mark.parametrize(
    ("state", "answer"),
    [
        (PullState.CONNECTING, [Fail, Free]),
        (PullState.RESERVED, [Fail, Free, SendDrop]),
        (PullState.FETCHING, [Fail]),
        (PullState.DISCARDING, []),
    ],
)
def test_a_lease_that_ends_fails_the_request_once(state: PullState, answer: list[type]) -> None:
    side = in_state(state)
    assert side.tick(LEASE_S - 0.1) == []
    actions = side.tick(LEASE_S)
    assert [type(action) for action in actions] == answer
    for action in actions:
        if isinstance(action, Fail):
            assert action.reason is HandoffFailure.LEASE_EXPIRED
    assert side.tick(3 * LEASE_S) == []


def test_a_renewed_lease_goes_on() -> None:
    side = in_state(PullState.RESERVED)
    side.renewed(2, [KEY], 6.0)
    assert side.deadline() == LEASE_S
    side.renewed(1, [KEY, RequestKey("unknown", 0)], 6.0)
    side.renewed(1, [KEY], 5.0)
    assert side.tick(6.0 + LEASE_S - 0.1) == []
    assert any(isinstance(action, Fail) for action in side.tick(6.0 + LEASE_S))


def test_news_counts_from_its_arrival_however_late_it_is_told() -> None:
    """A step took three leases; what arrived meanwhile is told after it, and before the tick."""
    side = in_state(PullState.RESERVED)
    side.renewed(1, [KEY], 10.0)
    side.offered(1, OFFER, 18.0)
    assert side.tick(3 * LEASE_S) == []
    assert side.deadline() == 18.0 + LEASE_S
    side.renewed(1, [KEY], 30.0)
    assert side.fetched(KEY, 21.5)[-1] == Deliver(KEY, BLOCKS, 99, 3.5, 21.5)


def test_owners_mistakes_are_errors() -> None:
    side = in_state(PullState.RESERVED)
    with pytest.raises(HandoffError, match="reserved already"):
        side.reserve(KEY, PEER, "host:1", 6, 2, BLOCKS, 0.0)
    with pytest.raises(HandoffError, match="never started"):
        side.fetched(KEY, 0.0)


def test_a_peer_that_is_being_dialled_is_not_dialled_again() -> None:
    """Even if the request that asked for the link has left: a second link would end the first."""
    side = in_state(PullState.CONNECTING)
    assert side.cancel(KEY) == [Free(KEY, BLOCKS)]
    second = RequestKey("b", 0)
    assert side.reserve(second, PEER, "host:1", 6, 2, BLOCKS, 0.0) == []
    assert side.link_up(1, PEER, 0.0) == [ConfirmReserved(second)]
    assert side.link_lost(1)
    assert side.reserve(KEY, PEER, "host:1", 6, 2, BLOCKS, 0.0) == [Connect(PEER, "host:1")]
    assert side.link_failed(PEER, HandoffFailure.PEER_UNREACHABLE, "gone")
    assert side.reserve(KEY, PEER, "host:1", 6, 2, BLOCKS, 0.0) == [Connect(PEER, "host:1")]
