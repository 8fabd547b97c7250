"""The prefill worker's half, event by event: what it answers in each state, and what it ignores."""

from __future__ import annotations

import pytest

from engine.sequence import RequestKey
from transfer.errors import HandoffError
from transfer.handoff import (
    Fail,
    Fence,
    Free,
    HandoffFailure,
    Offered,
    Peer,
    SendOffer,
    SendWithdraw,
)
from transfer.offer_side import OfferSide, OfferState

KEY, OTHER = RequestKey("a", 0), RequestKey("b", 0)
PEER = Peer("decode-0", 7)
LEASE_S = 8.0


def in_state(state: OfferState) -> OfferSide:
    """KEY in the given state on link 1, reached at time 0."""
    side = OfferSide(LEASE_S)
    assert side.link_up(1, PEER) == []
    side.promise(KEY, PEER)
    if state is not OfferState.PROMISED:
        side.offer(KEY, [4, 2], [10, 11], 5, 99, 0.0)
    if state is OfferState.WITHDRAWN:
        side.withdraw(KEY)
    assert side.counts()[state] == 1
    return side


def test_an_offer_carries_blocks_generations_and_the_first_token() -> None:
    side = in_state(OfferState.PROMISED)
    actions = side.offer(KEY, [4, 2], [10, 11], 5, 99, 1.0)
    assert actions == [SendOffer(1, Offered(KEY, 5, 99, (4, 2), (10, 11)))]
    assert side.num_blocks == 2


@pytest.mark.parametrize("state", [OfferState.OFFERED, OfferState.WITHDRAWN])
@pytest.mark.parametrize("answer", ["acknowledged", "dropped"])
def test_the_pullers_answer_frees(state: OfferState, answer: str) -> None:
    side = in_state(state)
    assert getattr(side, answer)(2, KEY) == [], "another link's answer must not free"
    assert getattr(side, answer)(1, RequestKey("a", 1)) == [], "another attempt's answer must not free"
    assert getattr(side, answer)(1, KEY) == [Free(KEY, (4, 2))]
    assert getattr(side, answer)(1, KEY) == []
    assert side.deadline() is None


def test_a_drop_before_the_offer_changes_nothing() -> None:
    side = in_state(OfferState.PROMISED)
    assert side.dropped(1, KEY) == []
    assert side.counts()[OfferState.PROMISED] == 1


def test_withdraw_keeps_the_blocks_until_the_puller_answers() -> None:
    side = in_state(OfferState.OFFERED)
    assert side.withdraw(KEY) == [SendWithdraw(1, KEY)]
    assert side.withdraw(KEY) == []
    assert side.num_blocks == 2


def test_withdraw_of_a_promise_is_told_and_forgotten() -> None:
    side = in_state(OfferState.PROMISED)
    assert side.withdraw(KEY) == [SendWithdraw(1, KEY)]
    assert side.withdraw(KEY) == []
    assert side.withdraw(RequestKey("never heard of", 0)) == []


def test_a_promise_to_a_peer_without_link_fails_at_the_offer() -> None:
    side = in_state(OfferState.PROMISED)
    assert side.link_lost(1) == []
    fail, free = side.offer(KEY, [4, 2], [10, 11], 5, 99, 1.0)
    assert isinstance(fail, Fail)
    assert fail.reason is HandoffFailure.PEER_UNREACHABLE
    assert free == Free(KEY, (4, 2))


@pytest.mark.parametrize("state", [OfferState.OFFERED, OfferState.WITHDRAWN])
def test_the_end_of_the_link_frees(state: OfferState) -> None:
    side = in_state(state)
    assert side.link_lost(2) == []
    assert side.link_lost(1) == [Free(KEY, (4, 2))]
    assert side.link_lost(1) == []


@pytest.mark.parametrize("epoch", [7, 8])
def test_a_new_link_of_the_same_worker_fences_the_old_one(epoch: int) -> None:
    side = in_state(OfferState.OFFERED)
    fence, free = side.link_up(2, Peer("decode-0", epoch))
    assert isinstance(fence, Fence)
    assert fence.link == 1
    assert free == Free(KEY, (4, 2))


@pytest.mark.parametrize("state", [OfferState.OFFERED, OfferState.WITHDRAWN])
def test_a_lease_that_ends_fences_before_it_frees(state: OfferState) -> None:
    side = in_state(state)
    assert side.tick(LEASE_S - 0.1) == []
    fence, free = side.tick(LEASE_S)
    assert isinstance(fence, Fence)
    assert fence.link == 1
    assert free == Free(KEY, (4, 2))
    assert side.acknowledged(1, KEY) == []


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
    side = in_state(OfferState.OFFERED)
    with pytest.raises(HandoffError, match="promised already"):
        side.promise(KEY, PEER)
    with pytest.raises(HandoffError, match="without a promise"):
        side.offer(KEY, [1], [1], 1, 1, 0.0)
