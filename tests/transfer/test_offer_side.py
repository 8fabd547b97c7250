"""The prefill worker's half, event by event: what it answers in each state, and what it ignores."""

from __future__ import annotations

import pytest

from engine.sequence import RequestKey
from transfer.errors import HandoffError
from transfer.handoff import (
    Abandon,
    Fail,
    Fence,
    Free,
    HandoffFailure,
    Lease,
    Peer,
    SendComplete,
    SendOffer,
    SendWithdraw,
)
from transfer.layout import Part
from transfer.offer_side import OfferSide, OfferState

KEY, OTHER = RequestKey("a", 0), RequestKey("b", 0)
PEER = Peer("decode-0", 7)
LEASE_S = 8.0

# Two layer groups of a chunk, then a chunk that ends in the middle of a block.
LOWER = Part(0, 4, 0, 1, (4, 2), (10, 11))
UPPER = Part(0, 4, 1, 2, (4, 2), (10, 11))
LAST = Part(4, 5, 0, 2, (9,), (12,))

ON_OFFER = [OfferState.OFFERING, OfferState.OFFERED, OfferState.WITHDRAWN]


def in_state(state: OfferState) -> OfferSide:
    """KEY in the given state on link 1, reached at time 0."""
    side = OfferSide(LEASE_S)
    assert side.link_up(1, PEER) == []
    side.promise(KEY, PEER)
    if state is not OfferState.PROMISED:
        side.offer(KEY, LOWER, 0.0)
        side.offer(KEY, UPPER, 0.0)
    if state in (OfferState.OFFERED, OfferState.WITHDRAWN):
        side.complete(KEY, 4, 99)
    if state is OfferState.WITHDRAWN:
        side.withdraw(KEY)
    assert side.counts()[state] == 1
    return side


def test_parts_are_offered_as_they_come_and_each_block_is_leased_once() -> None:
    side = in_state(OfferState.PROMISED)
    assert side.offer(KEY, LOWER, 1.0) == [Lease(KEY, (4, 2)), SendOffer(1, KEY, LOWER)]
    assert side.offer(KEY, UPPER, 1.5) == [Lease(KEY, ()), SendOffer(1, KEY, UPPER)]
    assert side.offer(KEY, LAST, 2.0) == [Lease(KEY, (9,)), SendOffer(1, KEY, LAST)]
    assert side.num_blocks == 3
    assert side.complete(KEY, 5, 99) == [SendComplete(1, KEY, 5, 99)]
    assert side.counts()[OfferState.OFFERED] == 1
    assert side.acknowledged(1, KEY) == [Free(KEY, (4, 2, 9))]
    assert side.num_blocks == 0


@pytest.mark.parametrize("state", ON_OFFER)
@pytest.mark.parametrize("answer", ["acknowledged", "dropped"])
def test_the_pullers_answer_frees(state: OfferState, answer: str) -> None:
    side = in_state(state)
    assert getattr(side, answer)(2, KEY) == [], "another link's answer must not free"
    assert getattr(side, answer)(1, RequestKey("a", 1)) == [], "another attempt's answer must not free"
    *first, free = getattr(side, answer)(1, KEY)
    assert first == ([Abandon(KEY)] if state is OfferState.OFFERING else [])
    assert free == Free(KEY, (4, 2))
    assert getattr(side, answer)(1, KEY) == []
    assert side.deadline() is None


@pytest.mark.parametrize("answer", ["acknowledged", "dropped"])
def test_an_answer_before_the_offer_changes_nothing(answer: str) -> None:
    side = in_state(OfferState.PROMISED)
    assert getattr(side, answer)(1, KEY) == []
    assert side.counts()[OfferState.PROMISED] == 1


@pytest.mark.parametrize("state", [OfferState.OFFERING, OfferState.OFFERED])
def test_withdraw_keeps_the_blocks_until_the_puller_answers(state: OfferState) -> None:
    side = in_state(state)
    assert side.withdraw(KEY) == [SendWithdraw(1, KEY)]
    assert side.withdraw(KEY) == []
    assert side.num_blocks == 2


def test_withdraw_of_a_promise_is_told_and_forgotten() -> None:
    side = in_state(OfferState.PROMISED)
    assert side.withdraw(KEY) == [SendWithdraw(1, KEY)]
    assert side.withdraw(KEY) == []
    assert side.withdraw(RequestKey("never heard of", 0)) == []
    unlinked = OfferSide(LEASE_S)
    unlinked.promise(KEY, PEER)
    assert unlinked.withdraw(KEY) == []
    assert unlinked.counts()[OfferState.PROMISED] == 0


@pytest.mark.parametrize("what", ["offer", "complete"])
def test_a_promise_to_a_peer_without_link_fails(what: str) -> None:
    side = in_state(OfferState.PROMISED)
    assert side.link_lost(1) == [], "it may be linked again until then"
    actions = side.offer(KEY, LOWER, 1.0) if what == "offer" else side.complete(KEY, 4, 99)
    fail, free = actions
    assert isinstance(fail, Fail)
    assert fail.reason is HandoffFailure.PEER_UNREACHABLE
    assert "decode-0@7" in fail.message
    assert free == Free(KEY, ())


def test_a_promise_is_kept_on_the_link_that_there_is_when_the_offer_comes() -> None:
    side = in_state(OfferState.PROMISED)
    side.link_lost(1)
    assert side.link_up(2, PEER) == []
    assert side.offer(KEY, LOWER, 1.0)[-1] == SendOffer(2, KEY, LOWER)


@pytest.mark.parametrize("state", ON_OFFER)
def test_the_end_of_the_link_frees(state: OfferState) -> None:
    side = in_state(state)
    assert side.link_lost(2) == []
    *first, free = side.link_lost(1)
    assert free == Free(KEY, (4, 2))
    if state is OfferState.OFFERING:  # else the puller, which has `complete`, tells
        (fail,) = first
        assert isinstance(fail, Fail)
        assert fail.reason is HandoffFailure.PEER_UNREACHABLE
    else:
        assert first == []
    assert side.link_lost(1) == []


@pytest.mark.parametrize("state", ON_OFFER)
@pytest.mark.parametrize("epoch", [7, 8])
def test_a_new_link_of_the_same_worker_fences_the_old_one(state: OfferState, epoch: int) -> None:
    side = in_state(state)
    fence, *_, free = side.link_up(2, Peer("decode-0", epoch))
    assert fence == Fence(1, f"decode-0@{epoch} opened a new link")
    assert free == Free(KEY, (4, 2))
    assert side.link_lost(1) == [], "it is known"


def test_another_workers_link_changes_nothing() -> None:
    side = in_state(OfferState.OFFERED)
    assert side.link_up(2, Peer("decode-1", 8)) == []
    assert side.link_lost(2) == []
    assert side.num_blocks == 2


@pytest.mark.parametrize("state", ON_OFFER)
def test_a_lease_that_ends_fences_before_it_frees(state: OfferState) -> None:
    side = in_state(state)
    assert side.deadline() == LEASE_S
    assert side.tick(LEASE_S - 0.1) == []
    fence, *_, free = side.tick(LEASE_S)
    assert isinstance(fence, Fence)
    assert fence.link == 1
    assert free == Free(KEY, (4, 2))
    assert side.acknowledged(1, KEY) == []
    assert side.tick(2 * LEASE_S) == []


def test_a_promise_has_no_lease() -> None:
    """It holds no blocks of its own; its scheduler ends it."""
    side = in_state(OfferState.PROMISED)
    assert side.deadline() is None
    assert side.tick(100 * LEASE_S) == []


def test_the_fence_ends_all_that_is_offered_on_the_link() -> None:
    side = in_state(OfferState.OFFERED)
    side.promise(OTHER, PEER)
    side.offer(OTHER, LAST, 7.0)
    fence, first, fail, second = side.tick(LEASE_S)
    assert isinstance(fence, Fence)
    assert isinstance(fail, Fail)
    assert (first, second) == (Free(KEY, (4, 2)), Free(OTHER, (9,)))


def test_a_renewed_lease_goes_on() -> None:
    side = in_state(OfferState.OFFERED)
    side.renewed(2, [KEY], 6.0)
    side.renewed(1, [OTHER], 6.0)
    assert side.deadline() == LEASE_S
    side.renewed(1, [KEY], 6.0)
    side.renewed(1, [KEY], 5.0)
    assert side.tick(6.0 + LEASE_S - 0.1) == []
    assert any(isinstance(action, Fence) for action in side.tick(6.0 + LEASE_S))


def test_news_counts_from_its_arrival_however_late_it_is_told() -> None:
    """A step took three leases; what arrived meanwhile is told after it, and before the tick."""
    side = in_state(OfferState.OFFERED)
    for arrived_s in (2.0, 10.0, 18.0, 22.0):
        side.renewed(1, [KEY], arrived_s)
    assert side.tick(3 * LEASE_S) == []
    assert side.deadline() == 22.0 + LEASE_S


def test_owners_mistakes_are_errors() -> None:
    for state in OfferState:
        with pytest.raises(HandoffError, match="promised already"):
            in_state(state).promise(KEY, PEER)
    for state in (OfferState.OFFERED, OfferState.WITHDRAWN):
        with pytest.raises(HandoffError, match=f"offered though it is {state.value}"):
            in_state(state).offer(KEY, LAST, 0.0)
        with pytest.raises(HandoffError, match=f"complete though it is {state.value}"):
            in_state(state).complete(KEY, 4, 99)
    with pytest.raises(HandoffError, match="offered though it is unknown"):
        in_state(OfferState.OFFERED).offer(OTHER, LAST, 0.0)
