"""The decode worker's half, event by event: what it answers in each state, and what it ignores."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.sequence import RequestKey
from transfer.errors import HandoffError
from transfer.handoff import (
    ConfirmReserved,
    Connect,
    Deliver,
    Disconnect,
    Fail,
    Free,
    HandoffFailure,
    Lend,
    PairChanged,
    Peer,
    PullAction,
    Recall,
    SendAcknowledge,
    SendDrop,
)
from transfer.layout import Part
from transfer.pull_side import PullSide, PullState

KEY, OTHER = RequestKey("a", 0), RequestKey("b", 0)
PEER = Peer("prefill-0", 7)
BLOCKS = (5, 6, 7)
LEASE_S = 8.0
UNREACHABLE = HandoffFailure.PEER_UNREACHABLE

# The two layers of the first four tokens, then the two last tokens in both layers.
LOWER = Part(0, 4, 0, 1, (1, 2), (10, 11))
UPPER = Part(0, 4, 1, 2, (1, 2), (10, 11))
LAST = Part(4, 6, 0, 2, (3,), (12,))
PARTS = (LOWER, UPPER, LAST)


def in_state(state: PullState) -> PullSide:
    """KEY in the given state, on link 1 if it has one, reached at time 0. FETCHING: all is offered, nothing
    copied, and the first token not there."""
    side = PullSide(2, LEASE_S)
    assert side.pair(PEER, "host:1", 0.0) == [Connect(PEER, "host:1")]
    assert side.reserve(KEY, PEER, "host:1", 6, 2, BLOCKS, 0.0) == []
    if state is not PullState.CONNECTING:
        told, lend, confirm = side.link_up(1, PEER, "ipc", 0.0)
        assert told == PairChanged(PEER, None, "ipc")
        assert (lend, confirm) == (Lend(1, KEY, BLOCKS, 2), ConfirmReserved(KEY))
    if state in (PullState.FETCHING, PullState.RECALLED):
        for part in PARTS:
            assert side.offered(1, KEY, part, 0.0) == []
    if state is PullState.RECALLED:
        assert side.cancel(KEY) == [Recall(KEY)]
    assert side.counts()[state] == 1
    return side


def complete(fetched: int = 0) -> PullSide:
    """All is offered and said to be complete; so many copies have ended."""
    side = in_state(PullState.FETCHING)
    assert side.completed(1, KEY, 6, 99, 1.0) == []
    for _ in range(fetched):
        assert side.fetched(KEY, 1.0) == []
    return side


def fails(actions: list[PullAction], reason: HandoffFailure, *rest: PullAction) -> str:
    """Asserts that the first action is Fail and the others are `rest`; the message."""
    fail, *others = actions
    assert isinstance(fail, Fail)
    assert (fail.key, fail.reason) == (KEY, reason)
    assert others == list(rest)
    return fail.message


def test_one_link_serves_all_requests_of_a_pair() -> None:
    side = in_state(PullState.CONNECTING)
    third = RequestKey("c", 0)
    assert side.reserve(OTHER, PEER, "host:1", 6, 0, [1], 0.0) == []
    assert side.link_up(1, PEER, "ipc", 0.0)[1:] == [
        Lend(1, KEY, BLOCKS, 2),
        ConfirmReserved(KEY),
        Lend(1, OTHER, (1,), 0),
        ConfirmReserved(OTHER),
    ]
    assert side.reserve(third, PEER, "host:1", 6, 0, [2], 0.0) == [
        Lend(1, third, (2,), 0),
        ConfirmReserved(third),
    ]


def test_a_request_dials_a_peer_that_no_pair_was_asked_for() -> None:
    side = PullSide(2, LEASE_S)
    assert side.reserve(KEY, PEER, "host:1", 6, 0, BLOCKS, 0.0) == [Connect(PEER, "host:1")]
    fails(side.link_failed(PEER, UNREACHABLE, "down", 1.0), UNREACHABLE, Free(KEY, BLOCKS))
    assert side.deadline() is None


def test_it_is_delivered_when_complete_and_all_copies_have_ended() -> None:
    side = complete(fetched=2)
    assert side.fetched(KEY, 3.5) == [SendAcknowledge(1, KEY), Deliver(KEY, BLOCKS, 99, 2.5, 3.5)]
    assert side.num_blocks == 0
    assert side.deadline() is None


def test_copies_that_ended_before_complete_cost_the_request_nothing() -> None:
    side = in_state(PullState.FETCHING)
    for ended_s in (0.5, 0.7, 0.6):
        assert side.fetched(KEY, ended_s) == []
    assert side.completed(1, KEY, 6, 99, 2.0)[-1] == Deliver(KEY, BLOCKS, 99, 0.0, 2.0)


def test_a_second_complete_changes_nothing() -> None:
    side = complete()
    assert side.completed(1, KEY, 6, 98, 2.0) == []
    for _ in range(2):
        side.fetched(KEY, 3.0)
    assert side.fetched(KEY, 3.0)[-1] == Deliver(KEY, BLOCKS, 99, 2.0, 3.0)


@pytest.mark.parametrize("is_complete", [False, True])
def test_a_failed_copy_fails_the_request_once(is_complete: bool) -> None:
    side = complete() if is_complete else in_state(PullState.FETCHING)
    actions = side.fetch_failed(KEY, "stale")
    assert fails(actions, HandoffFailure.TRANSFER_FAILED, Recall(KEY)) == "stale"
    assert side.fetch_failed(KEY, "stale") == []
    assert side.fetched(KEY, 2.0) == []
    assert side.recalled(KEY) == [Free(KEY, BLOCKS), SendDrop(1, KEY)]


def test_a_link_that_cannot_be_made_fails_who_waits_for_it() -> None:
    side = in_state(PullState.CONNECTING)
    mismatch = HandoffFailure.PEER_MISMATCH
    assert side.link_failed(Peer("prefill-0", 8), mismatch, "dtype", 0.0) == []
    told, *actions = side.link_failed(PEER, mismatch, "dtype", 0.0)
    assert told == PairChanged(PEER, mismatch, "dtype")
    assert fails(actions, mismatch, Free(KEY, BLOCKS)) == "dtype"


@pytest.mark.parametrize("state", [PullState.RESERVED, PullState.FETCHING, PullState.RECALLED])
def test_a_link_that_cannot_be_made_concerns_nobody_who_has_one(state: PullState) -> None:
    assert in_state(state).link_failed(PEER, UNREACHABLE, "late news", 0.0) == []


@pytest.mark.parametrize(
    ("state", "answer"),
    [
        (PullState.CONNECTING, [Free(KEY, BLOCKS)]),
        (PullState.RESERVED, [Recall(KEY)]),
        (PullState.FETCHING, [Recall(KEY)]),
        (PullState.RECALLED, []),
    ],
)
def test_cancel(state: PullState, answer: list[PullAction]) -> None:
    side = in_state(state)
    assert side.cancel(RequestKey("a", 1)) == []
    assert side.cancel(KEY) == answer
    assert side.cancel(KEY) == []


LATE: list[Callable[[PullSide], list[PullAction]]] = [
    lambda side: side.offered(1, KEY, LAST, 5.0),
    lambda side: side.completed(1, KEY, 6, 99, 5.0),
    lambda side: side.withdrawn(1, KEY),
    lambda side: side.cancel(KEY),
    lambda side: side.fetched(KEY, 5.0),
    lambda side: side.fetch_failed(KEY, "stale"),
    lambda side: side.tick(2 * LEASE_S),
]


@pytest.mark.parametrize("event", LATE)
def test_recalled_blocks_stay_until_they_are_back(event: Callable[[PullSide], list[PullAction]]) -> None:
    side = in_state(PullState.RECALLED)
    assert event(side) == []
    assert side.num_blocks == 3
    assert side.recalled(KEY) == [Free(KEY, BLOCKS), SendDrop(1, KEY)]
    assert side.num_blocks == 0


def test_the_end_of_the_link_does_not_bring_blocks_back() -> None:
    side = in_state(PullState.RECALLED)
    (told,) = side.link_lost(1, 0.0)
    assert isinstance(told, PairChanged)
    assert side.num_blocks == 3
    assert side.recalled(KEY) == [Free(KEY, BLOCKS)], "there is nobody to answer"


@pytest.mark.parametrize("state", [PullState.RESERVED, PullState.FETCHING])
def test_withdraw_is_answered_with_drop_when_no_copy_runs(state: PullState) -> None:
    side = in_state(state)
    assert side.withdrawn(1, KEY) == [Recall(KEY)]
    assert side.recalled(KEY) == [Free(KEY, BLOCKS), SendDrop(1, KEY)]
    assert side.withdrawn(1, KEY) == [SendDrop(1, KEY)]


@pytest.mark.parametrize("state", list(PullState))
@pytest.mark.parametrize(
    "event",
    [
        lambda side, link, key: side.offered(link, key, LOWER, 5.0),
        lambda side, link, key: side.completed(link, key, 6, 99, 5.0),
        lambda side, link, key: side.withdrawn(link, key),
    ],
)
def test_what_nobody_waits_for_is_dropped(
    state: PullState, event: Callable[[PullSide, int, RequestKey], list[PullAction]]
) -> None:
    """Of another attempt, or over another link than the one that it was reserved on."""
    side = in_state(state)
    other_attempt = RequestKey("a", 1)
    assert event(side, 1, other_attempt) == [SendDrop(1, other_attempt)]
    assert event(side, 2, KEY) == [SendDrop(2, KEY)]
    assert side.counts()[state] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        LAST,  # not the first
        Part(0, 8, 0, 2, (1, 2, 3, 4), (1, 1, 1, 1)),  # more than is reserved
        Part(0, 0, 0, 2, (), ()),
        Part(0, 4, 1, 3, (1, 2), (1, 1)),  # a layer that there is not
        Part(0, 4, 1, 1, (1, 2), (1, 1)),
    ],
)
def test_an_offer_that_does_not_fit_fails_the_request(wrong: Part) -> None:
    side = in_state(PullState.RESERVED)
    fails(side.offered(1, KEY, wrong, 0.0), HandoffFailure.TRANSFER_FAILED, Recall(KEY))
    assert side.recalled(KEY) == [Free(KEY, BLOCKS), SendDrop(1, KEY)]


def test_an_offer_that_comes_again_or_after_complete_fails_the_request() -> None:
    for side, part in ((in_state(PullState.FETCHING), LOWER), (complete(), Part(6, 8, 0, 2, (4,), (1,)))):
        fails(side.offered(1, KEY, part, 0.0), HandoffFailure.TRANSFER_FAILED, Recall(KEY))


def test_complete_must_be_what_was_reserved_and_offered() -> None:
    failed = HandoffFailure.TRANSFER_FAILED
    message = fails(in_state(PullState.RESERVED).completed(1, KEY, 6, 99, 0.0), failed, Recall(KEY))
    assert message == "prefill-0@7 offered 0 tokens in all layers and calls 6 complete; 6 are reserved"
    fails(in_state(PullState.FETCHING).completed(1, KEY, 5, 99, 0.0), failed, Recall(KEY))
    side = in_state(PullState.RESERVED)
    side.offered(1, KEY, LOWER, 0.0)
    side.offered(1, KEY, Part(4, 6, 0, 1, (3,), (12,)), 0.0)
    fails(side.completed(1, KEY, 6, 99, 0.0), failed, Recall(KEY))


@pytest.mark.parametrize("state", [PullState.RESERVED, PullState.FETCHING])
def test_a_lost_link_fails_what_is_not_all_offered(state: PullState) -> None:
    side = in_state(state)
    assert side.link_lost(2, 3.0) == []
    told, *actions = side.link_lost(1, 3.0)
    fails(actions, UNREACHABLE, Recall(KEY))
    assert isinstance(told, PairChanged)
    assert told.reason is UNREACHABLE
    assert side.tick(3.0) == [Connect(PEER, "host:1")]
    assert side.recalled(KEY) == [Free(KEY, BLOCKS)]


def test_a_link_lost_when_all_is_offered_leaves_the_verdict_to_the_generations() -> None:
    side = complete(fetched=2)
    assert len(side.link_lost(1, 2.0)) == 1, "only the pair"
    assert side.fetched(KEY, 3.0) == [Deliver(KEY, BLOCKS, 99, 2.0, 3.0)]
    side = complete(fetched=2)
    side.link_lost(1, 2.0)
    fails(side.fetch_failed(KEY, "stale"), HandoffFailure.TRANSFER_FAILED, Recall(KEY))
    assert side.recalled(KEY) == [Free(KEY, BLOCKS)]


def test_a_lost_link_does_not_concern_who_waits_for_the_next() -> None:
    side = in_state(PullState.RESERVED)
    side.link_lost(1, 3.0)
    assert side.reserve(OTHER, PEER, "host:1", 6, 0, [1], 3.0) == [Connect(PEER, "host:1")]
    assert side.link_lost(1, 3.0) == []
    lend = Lend(2, OTHER, (1,), 0)
    assert side.link_up(2, PEER, "ipc", 4.0)[1:] == [lend, ConfirmReserved(OTHER)]


@pytest.mark.parametrize(
    ("state", "answer"),
    [
        (PullState.CONNECTING, [Fail, Free]),
        (PullState.RESERVED, [Fail, Recall, Disconnect]),
        (PullState.FETCHING, [Fail, Recall, Disconnect]),
        (PullState.RECALLED, [Disconnect]),
    ],
)
def test_unpair_ends_what_waits_for_the_peer(state: PullState, answer: list[type]) -> None:
    side = in_state(state)
    assert side.unpair(Peer("prefill-0", 8)) == []
    actions = side.unpair(PEER)
    assert [type(action) for action in actions] == answer
    assert side.unpair(PEER) == []
    assert side.deadline() is None


def test_unpair_lets_copies_end() -> None:
    side = complete(fetched=2)
    assert side.unpair(PEER) == [Disconnect(1)]
    assert side.fetched(KEY, 3.0) == [Deliver(KEY, BLOCKS, 99, 2.0, 3.0)]


@pytest.mark.parametrize(
    ("state", "answer"),
    [
        (PullState.CONNECTING, [Fail, Free]),
        (PullState.RESERVED, [Fail, Recall]),
        (PullState.FETCHING, [Fail, Recall]),
        (PullState.RECALLED, []),
    ],
)
def test_a_lease_that_ends_fails_the_request_once(state: PullState, answer: list[type]) -> None:
    side = in_state(state)
    assert side.deadline() == (None if state is PullState.RECALLED else LEASE_S)
    assert side.tick(LEASE_S - 0.1) == []
    actions = side.tick(LEASE_S)
    assert [type(action) for action in actions] == answer
    if actions:
        fails(actions, HandoffFailure.LEASE_EXPIRED, actions[1])
    assert side.tick(3 * LEASE_S) == []


def test_a_renewed_lease_goes_on() -> None:
    side = in_state(PullState.RESERVED)
    side.renewed(2, [KEY], 6.0)
    assert side.deadline() == LEASE_S
    side.renewed(1, [KEY, RequestKey("unknown", 0)], 6.0)
    side.renewed(1, [KEY], 5.0)
    assert side.tick(6.0 + LEASE_S - 0.1) == []
    assert any(isinstance(action, Fail) for action in side.tick(6.0 + LEASE_S))


def test_the_lease_starts_anew_with_the_link() -> None:
    side = in_state(PullState.CONNECTING)
    side.link_up(1, PEER, "ipc", 6.0)
    assert side.deadline() == 6.0 + LEASE_S


def test_news_counts_from_its_arrival_however_late_it_is_told() -> None:
    """A step took three leases; what arrived meanwhile is told after it, and before the tick."""
    side = in_state(PullState.RESERVED)
    side.renewed(1, [KEY], 10.0)
    for part, arrived_s in zip(PARTS, (11.0, 14.0, 16.0), strict=True):
        side.offered(1, KEY, part, arrived_s)
    side.completed(1, KEY, 6, 99, 18.0)
    assert side.tick(3 * LEASE_S) == []
    assert side.deadline() == 18.0 + LEASE_S
    side.fetched(KEY, 15.0)
    side.fetched(KEY, 17.0)
    assert side.fetched(KEY, 21.5)[-1] == Deliver(KEY, BLOCKS, 99, 3.5, 21.5)


def test_owners_mistakes_are_errors() -> None:
    for state in PullState:
        with pytest.raises(HandoffError, match="reserved already"):
            in_state(state).reserve(KEY, PEER, "host:1", 6, 0, BLOCKS, 0.0)
        if state is not PullState.RECALLED:
            with pytest.raises(HandoffError, match="nobody asked for them"):
                in_state(state).recalled(KEY)
    side = in_state(PullState.FETCHING)
    for _ in PARTS:
        side.fetched(KEY, 0.0)
    with pytest.raises(HandoffError, match="never started"):
        side.fetched(KEY, 0.0)


@pytest.mark.parametrize("state", [PullState.CONNECTING, PullState.RESERVED])
def test_a_copy_that_nobody_waits_for_is_ignored(state: PullState) -> None:
    side = in_state(state)
    for key in (KEY, OTHER):
        assert side.fetched(key, 1.0) == []
        assert side.fetch_failed(key, "stale") == []
    assert side.counts()[state] == 1
