"""Who is told at once that there is no use in waiting, and whether that was right."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.admission.base import Refusal
from router.admission.goodput import OPTIMISM, GoodputAdmission
from router.errors import LateError, OverloadedError, PromptTooLongError, SloImpossibleError
from router.estimates import DecodeEstimate, LocalEstimate, PrefillEstimate
from router.gate.goodput import GoodputGateQueue
from router.gate.readers import Readers
from router.pair_table import LinkState, Pair, PairLink
from router.pool_view import PoolView, Role, WorkerCapacity, WorkerView
from router.prefix_index import PrefixIndex
from router.slo import Slo, SloLimits

TOKEN_S = 0.001
CAPACITY = WorkerCapacity(16, 10**5, 8, 2048)


class Situation:
    """One prefill and one decode worker, as they are predicted to be; and who was let in."""

    only_read = True

    def __init__(self, max_gated_requests=64):
        self.pool = PoolView()
        self.pool.add(WorkerView("p", 1, Role.PREFILL, CAPACITY))
        self.pool.add(WorkerView("d", 1, Role.DECODE, CAPACITY))
        self.pool.pairs.put(Pair("p", "d"), PairLink(LinkState.LINKED))
        self.gate = GoodputGateQueue(Readers(self.pool, self, PrefixIndex(self.pool)))
        self.admission = GoodputAdmission(self.pool, self.gate, self, max_gated_requests, retry_after_s=1.0)
        self.known = True
        self.outgrown = False
        self.cached_tokens = 0
        self.wait_s = 0.0
        self.tpot_s = {0.0: 0.02}  # by when the request would join

    def read_s(self, request):
        return TOKEN_S * request.num_tokens if self.known else 0.0

    def prefill(self, worker, request, now):
        return PrefillEstimate(self.wait_s, self.read_s(request) - TOKEN_S * self.cached_tokens, 0)

    def outgrows(self, worker, request):
        return self.outgrown

    def local(self, worker, request, now):
        return LocalEstimate(self.wait_s, self.read_s(request), 0.02, 512, 0)

    def idle(self, request):
        return (self.read_s(request), 0.01) if self.known else None

    def decode(self, worker, request, in_s, now):
        step_s = self.tpot_s[max(since for since in self.tpot_s if since <= in_s)]
        return DecodeEstimate(step_s, 0.1, 2, request.num_tokens)

    def judge(self, request, now=0.0, ahead=0):
        return self.admission.judge(request, now, ahead, overdue=False)

    def refused(self, request, now=0.0, ahead=0):
        verdict = self.judge(request, now, ahead)
        assert isinstance(verdict, Refusal)
        return verdict

    def wait(self, *requests, now=0.0):
        """These wait at the gate."""
        for request in requests:
            self.gate.add(request)
        self.gate.next(now)

    def crowd(self, request_of, arrived_at=0.0):
        """Eight who wait for 3.52 s of reading; four are kept, for 1.76 s."""
        waiting = [request_of(f"r{index}", tokens=440, arrived_at=arrived_at) for index in range(8)]
        self.wait(*waiting, now=arrived_at)
        return waiting

    def leave(self, waiting):
        for one in waiting:
            self.gate.remove(one.request_id)


@pytest.fixture
def situation():
    return Situation()


@pytest.fixture
def request_of(make_request):
    def make(name="r", tokens=500, ttft_s=2.0, tpot_s=0.05, arrived_at=0.0, **slo):
        limits = SloLimits(ttft_s, tpot_s)
        request = make_request(name, prompt_tokens=tokens, max_tokens=64, arrived_at=arrived_at)
        return replace(request, slo=Slo("default", limits, **slo))

    return make


def test_who_can_be_in_time_is_let_in_as_it_is(situation, request_of):
    request = request_of()
    assert situation.judge(request) is request
    situation.wait(request_of("a"), request_of("b"))
    request = request_of("c")
    assert situation.judge(request) is request


@pytest.mark.parametrize(
    ("num_late", "tokens", "let_in"), [(5, 1500, True), (8, 1500, False), (8, 1000, True)]
)
def test_one_has_to_be_surer_where_late_ones_begin_to_fill_the_gate(request_of, num_late, tokens, let_in):
    situation = Situation(max_gated_requests=6)
    situation.wait(*(request_of(f"late{index}") for index in range(num_late)), now=100.0)
    assert situation.gate.num_late == num_late
    verdict = situation.judge(request_of(tokens=tokens, arrived_at=100.0), 100.0)
    assert isinstance(verdict, Refusal) is not let_in
    assert let_in or verdict.reason == "late"


def test_who_would_be_late_is_refused_and_told_when_to_come_again(situation, request_of):
    situation.crowd(request_of)
    refusal = situation.refused(request_of("late"))
    assert (refusal.reason, refusal.counts) == ("late", True)
    assert isinstance(refusal.error, LateError)
    assert refusal.error.ttft_s == pytest.approx(4.02)
    assert refusal.error.retry_after_s == pytest.approx(2.02)  # by so much it is beyond the limit
    assert str(refusal.error) == (
        "the request would be late: with 8 others before it, its time to first token is predicted to be 4.02 "
        "s, and its limit is 2 s; try again in 2.02 s, or allow more time"
    )
    assert len(situation.gate) == 8


def test_only_those_before_it_count(situation, request_of):
    situation.crowd(request_of)
    for request in (
        request_of("first", ttft_s=1.0),
        request_of("vip", priority=1),
        request_of("a", ttft_s=9.0),
    ):
        assert situation.judge(request) is request
    assert situation.refused(request_of("low", ttft_s=2.1, priority=-1)).reason == "late"


def test_the_prediction_is_given_some_credit(situation, request_of):
    situation.wait(*(request_of(f"r{index}") for index in range(3)))
    edge = OPTIMISM * 2.0 - 3 * 0.5 - 0.5
    situation.wait_s = edge - 0.01
    assert situation.judge(request_of("just")).request_id == "just"
    situation.wait_s = edge + 0.01
    assert situation.refused(request_of("not")).reason == "late"


def test_who_would_be_in_time_if_a_larger_one_were_given_up_is_let_in(situation, request_of):
    situation.wait(*(request_of(f"r{index}", tokens=1200, ttft_s=4.0) for index in range(6)))
    assert situation.refused(request_of("large", tokens=1900, ttft_s=4.1)).reason == "late"
    assert situation.judge(request_of("small", tokens=600, ttft_s=4.1)).request_id == "small"


def test_the_more_late_ones_wait_the_less_is_hoped_for(situation, request_of):
    def is_let_in(now):
        waiting = situation.crowd(request_of, arrived_at=now)
        verdict = situation.judge(request_of("small", tokens=50, ttft_s=2.1, arrived_at=now), now)
        situation.leave(waiting)
        return not isinstance(verdict, Refusal)

    assert is_let_in(now=50.0)  # among those that are kept there is room for it
    situation.wait(*(request_of(f"late{index}", tokens=1900) for index in range(20)), now=60.0)
    assert situation.gate.num_late == 20
    assert not is_let_in(now=61.0)


def test_others_of_the_same_call_are_before_it(situation, request_of):
    assert situation.judge(request_of(), ahead=3).request_id == "r"
    assert "with 5 others" in str(situation.refused(request_of(), ahead=5).error)


def test_own_limits_that_nobody_could_keep_are_wrong(situation, request_of):
    refusal = situation.refused(request_of(tokens=500, ttft_s=0.4, own_ttft=True))
    assert (refusal.reason, refusal.counts) == ("slo_impossible", False)
    assert isinstance(refusal.error, SloImpossibleError)
    assert str(refusal.error) == (
        "a TTFT of 0.4 s is not possible here: with nothing else to do, one of 500 tokens takes 0.5 s to its "
        "first token and 0.01 s for each one after it; ask for at least that"
    )
    assert "a TPOT of 0.005 s" in str(situation.refused(request_of(tpot_s=0.005, own_tpot=True)).error)
    near = request_of(
        ttft_s=0.46, tpot_s=0.0095, own_ttft=True, own_tpot=True
    )  # within what a prediction may be wrong
    assert situation.judge(near) is near
    situation.cached_tokens = 200
    cached = request_of(ttft_s=0.4, own_ttft=True)
    assert situation.judge(cached) is cached


def test_limits_of_a_class_that_nobody_could_keep_refuse_nobody(situation, request_of):
    situation.wait(*(request_of(f"r{index}") for index in range(9)))
    for request in (request_of(tokens=2001), request_of(tpot_s=0.005)):
        assert situation.judge(request) is request


def test_nothing_is_refused_by_predictions_while_there_are_none(situation, request_of):
    situation.known = False
    situation.wait(*(request_of(f"r{index}") for index in range(9)))
    request = request_of(ttft_s=1e-9, tpot_s=1e-9, own_ttft=True, own_tpot=True)
    assert situation.judge(request) is request


def test_who_may_be_downgraded_is_served_as_what_can_be_kept(situation, request_of):
    situation.crowd(request_of)
    relaxed = Slo("relaxed", SloLimits(10.0, 0.5), priority=-1)
    too_tight = Slo("tight", SloLimits(2.1, 0.05), downgraded=relaxed)
    request = request_of("r", downgraded=too_tight)
    assert situation.judge(request) == replace(request, slo=relaxed)
    situation.wait(*(request_of(f"s{index}", ttft_s=30.0) for index in range(30)))
    refusal = situation.refused(request)
    assert "its limit is 2 s" in str(refusal.error)  # what it asked for


def test_who_would_get_its_tokens_too_slowly_is_refused(situation, request_of):
    situation.tpot_s = {0.0: 0.08}
    refusal = situation.refused(request_of())
    assert (refusal.reason, refusal.counts) == ("late", True)
    assert str(refusal.error) == (
        "the request would be late: each token of its answer is predicted to take 0.08 s, for many are "
        "written, and its limit is 0.05 s; its time to first token is predicted to be 0.5 s; try again in "
        "1 s, or allow more time"
    )
    situation.tpot_s = {0.0: 0.08, 0.9: 0.06}  # many will have ended before its first token is due
    request = request_of()
    assert situation.judge(request) is request


def test_late_ones_take_no_place_from_those_in_time(request_of):
    situation = Situation(max_gated_requests=4)
    situation.wait(*(request_of(f"late{index}", tokens=10) for index in range(4)), now=5.0)
    now_here = request_of("a", tokens=10, arrived_at=5.0)
    assert situation.judge(now_here, now=5.0) is now_here
    situation.wait(*(request_of(f"r{index}", tokens=10, arrived_at=5.0) for index in range(4)), now=5.0)
    full = situation.refused(request_of("b", tokens=10, arrived_at=5.0), now=5.0)
    assert (full.reason, full.counts) == ("gate_full", True)
    assert isinstance(full.error, OverloadedError)
    situation = Situation(max_gated_requests=4)  # but twice as many is all
    situation.wait(*(request_of(f"late{index}", tokens=10) for index in range(8)), now=5.0)
    assert situation.refused(now_here, now=5.0).reason == "gate_full"


def test_what_fits_nowhere_is_refused_first(situation, request_of):
    refusal = situation.refused(request_of(tokens=16 * 10**5))
    assert isinstance(refusal.error, PromptTooLongError)
    assert refusal.reason == "never_fits"


class TestAudit:
    def refuse(self, situation, request_of, count=1):
        """So many are refused, as others wait; these leave."""
        waiting = situation.crowd(request_of)
        for index in range(count):
            situation.refused(request_of(f"late{index}", ttft_s=2.1))
        situation.leave(waiting)

    def test_who_finds_free_workers_in_time_was_refused_in_vain_once(self, situation, request_of):
        self.refuse(situation, request_of)
        situation.wait(request_of("other"))
        assert situation.admission.could_have_served(0.5) == 0  # another waits who can be in time
        situation.gate.remove("other")
        situation.wait_s = 1.2
        assert situation.admission.could_have_served(0.6) == 0  # readers are busy for too long
        situation.wait_s = 0.4
        assert situation.admission.could_have_served(0.7) == 1
        assert situation.admission.could_have_served(0.8) == 0

    def test_nobody_was_refused_in_vain_whose_time_has_passed(self, situation, request_of):
        self.refuse(situation, request_of)
        assert situation.admission.could_have_served(1.7) == 0
        assert situation.admission.could_have_served(0.1) == 0  # it is forgotten

    def test_those_who_are_late_do_not_stand_in_the_way(self, situation, request_of):
        self.refuse(situation, request_of)
        situation.wait(request_of("late", arrived_at=-5.0), now=0.1)
        assert situation.gate.num_late == 1
        assert situation.admission.could_have_served(0.5) == 1

    def test_writers_must_have_room_too(self, situation, request_of):
        self.refuse(situation, request_of)
        situation.tpot_s = {0.0: 0.06}
        assert situation.admission.could_have_served(0.5) == 0
        situation.tpot_s = {0.0: 0.05}
        situation.pool["d"].refuse()
        assert situation.admission.could_have_served(0.6) == 0
        situation.pool.add(WorkerView("d2", 1, Role.DECODE, CAPACITY))
        assert situation.admission.could_have_served(0.7) == 1

    def test_room_is_there_for_as_many_as_it_holds(self, situation, request_of):
        self.refuse(situation, request_of, count=9)
        # From 0.5 s on, the reader has time for three of half a second that end at 2.1 s.
        assert situation.admission.could_have_served(0.5) == 3
        assert situation.admission.could_have_served(0.52) == 0

    def test_what_is_too_much_to_keep_is_counted_with_the_next(self, situation, request_of):
        kept = 2**18 // 500
        self.refuse(situation, request_of, count=kept + 7)
        for step in range(100):  # all are forgotten, some at a time
            assert situation.admission.could_have_served(2.0 + step / 10) == 0
        waiting = situation.crowd(request_of, arrived_at=20.0)
        situation.refused(request_of("next", ttft_s=2.1, arrived_at=20.0), now=20.0)
        situation.leave(waiting)
        assert situation.admission.could_have_served(20.5) == 8
