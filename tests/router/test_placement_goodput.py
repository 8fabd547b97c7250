"""The goodput placement: where a request is good and harms nobody."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.prefix_digests import prefix_digests, short
from engine.sequence import RequestKey
from router.pair_table import Pair
from router.placement import goodput
from router.placement.base import Decision, Kind
from router.placement.least_loaded import LeastLoadedPlacement
from router.placement.options import Options
from router.pool_view import Role
from router.slo import SloLimits
from tests.router.pools import CAPACITY, Fixture, pool_of

LOOSE = SloLimits(2.0, 0.1)
READ_512_S = 0.52


def place(fixture, request, prefill, writer, now=0.0, tokens=0):
    """A request is put there, and `tokens` of its answer come."""
    kind = Kind.LOCAL if prefill is None else Kind.DISAGGREGATED
    key = RequestKey(request.request_id, 1)
    fixture.estimates.credit(key, request, Decision(kind, prefill, writer), now)
    if tokens and prefill is not None:
        fixture.pool[prefill].release(key)
    for _ in range(tokens):
        fixture.pool[writer].emitted(key, 1)


def writing(fixture, writer, count, limits=LOOSE, make_request=None):
    for number in range(count):
        request = make_request(f"w{number}-{writer}", prompt_tokens=512, limits=limits)
        place(
            fixture,
            request,
            "p0" if "p0" in {one.worker_id for one in fixture.pool} else None,
            writer,
            tokens=2,
        )


def choose(fixture, request, now=0.0, avoid=()):
    return fixture.policy.placement.choose(request, avoid, now)


@pytest.fixture(autouse=True)
def no_exploring(monkeypatch):
    monkeypatch.setattr(goodput, "EXPLORE", 0.0)


def test_an_idle_pair_reads_at_once_and_says_what_to_expect(make_request):
    decision = choose(Fixture("goodput", pool_of(1, 1)), make_request(prompt_tokens=512, limits=LOOSE))
    assert (decision.kind, decision.prefill, decision.decode) == (Kind.DISAGGREGATED, "p0", "d0")
    assert decision.expected.ttft_s == pytest.approx(READ_512_S, rel=0.01)
    assert decision.expected.tpot_s == pytest.approx(0.0095, rel=0.1)


def test_a_request_waits_until_its_prompt_would_be_started_soon(make_request):
    fixture = Fixture("goodput", pool_of(1, 1))
    place(fixture, make_request("a", prompt_tokens=512, limits=LOOSE), "p0", "d0")
    request = make_request("b", prompt_tokens=512, limits=LOOSE)
    assert choose(fixture, request, now=0.1) is None
    assert choose(fixture, request, now=0.45) is not None


def test_it_says_how_long_time_alone_changes_nothing(make_request):
    """Until a reader is nearly done; and of a batch that is full, for a small part of a limit."""
    fixture = Fixture("goodput", pool_of(1, 1))
    place(fixture, make_request("a", prompt_tokens=512, limits=LOOSE), "p0", "d0")
    waits = make_request("b", prompt_tokens=512, limits=LOOSE)
    assert choose(fixture, waits, now=0.36) is None
    retry_s = fixture.policy.retry_s()
    assert retry_s == pytest.approx(READ_512_S - 0.36 - goodput.STAGE_S, abs=0.01)
    assert choose(fixture, waits, now=0.36 + retry_s - 0.001) is None
    assert choose(fixture, waits, now=0.36 + retry_s + 0.001) is not None
    fixture = Fixture("goodput", pool_of(1, 1))
    tight = SloLimits(2.0, 0.0115)
    writing(fixture, "d0", 2, tight, make_request)
    assert choose(fixture, make_request(limits=tight)) is None
    assert fixture.policy.retry_s() == pytest.approx(goodput.RETRY_SHARE * 2.0)


def long_answer(make_request, name, limits=LOOSE):
    """A prompt takes 32 blocks of 256, an answer 64 at most."""
    return make_request(name, prompt_tokens=512, limits=limits, max_tokens=1024)


def with_two_long_answers(make_request, seen):
    """seen: answers of 1,000 tokens, of which lengths are known."""
    fixture = Fixture("goodput", pool_of(1, 1))
    for _ in range(seen):
        fixture.lengths.observe(long_answer(make_request, "seen"), 1000)
    for name in "ab":
        place(fixture, long_answer(make_request, name), "p0", "d0", tokens=2)
    return fixture


def test_an_answer_waits_for_the_room_that_it_is_expected_to_need(make_request):
    """Three would be 3 * (32 + 63) blocks. As long as nothing is known of lengths it goes ahead."""
    third = long_answer(make_request, "c")
    assert choose(with_two_long_answers(make_request, seen=0), third) is not None
    fixture = with_two_long_answers(make_request, seen=30)
    assert choose(fixture, third) is None
    assert fixture.policy.retry_s() <= goodput.RETRY_SHARE * LOOSE.ttft_s
    fixture.pool["d0"].release(RequestKey("b", 1))
    assert choose(fixture, third) is not None


def test_who_is_late_waits_for_room_until_its_turn(make_request):
    """Or small ones would pass a large one for ever."""
    fixture = with_two_long_answers(make_request, seen=30)
    late = long_answer(make_request, "late", limits=SloLimits(0.1, 0.1))
    assert choose(fixture, late, now=5.0) is None
    fixture.policy.placement._is_its_turn = {"late"}.__contains__
    assert choose(fixture, late, now=5.0) is not None


def test_a_near_writer_goes_before_one_behind_a_slow_link(make_request):
    fixture = Fixture("goodput", pool_of(1, 2))
    for _ in range(40):
        fixture.estimates.transfers.observe(Pair("p0", "d0"), 512, 0.5)
        fixture.estimates.transfers.observe(Pair("p0", "d1"), 512, 0.005)
    request = make_request(prompt_tokens=512, limits=LOOSE)
    assert {choose(fixture, request).decode for _ in range(20)} == {"d1"}
    # Where it has a shorter step all the same, the far one: half a second over 100 tokens is 5 ms.
    writing(fixture, "d1", 6, LOOSE, make_request)
    assert choose(fixture, make_request("b", prompt_tokens=512, limits=LOOSE), now=60.0).decode == "d0"


def test_where_nobody_knows_how_long_steps_take_loads_decide(make_request):
    fixture = Fixture("goodput", pool_of(1, 2, model=None))
    for _ in range(40):
        fixture.estimates.transfers.observe(Pair("p0", "d0"), 512, 0.5)
        fixture.estimates.transfers.observe(Pair("p0", "d1"), 512, 0.005)
    place(fixture, make_request("a", prompt_tokens=16, limits=LOOSE), "p0", "d1", tokens=2)
    assert choose(fixture, make_request("b", prompt_tokens=16, limits=LOOSE), now=9.0).decode == "d0"


def test_the_first_token_decides_between_prefill_workers(make_request):
    fixture = Fixture("goodput", pool_of(2, 1))
    place(fixture, make_request("a", prompt_tokens=64, limits=LOOSE), "p0", "d0")
    assert choose(fixture, make_request("b", prompt_tokens=64, limits=LOOSE)).prefill == "p1"


def hold(fixture, worker_id, request):
    digests = prefix_digests("", "", CAPACITY.block_size, request.prompt_token_ids)
    fixture.prefixes.stored(worker_id, map(short, digests))


def test_a_cached_prefix_is_worth_a_short_wait(make_request):
    fixture = Fixture("goodput", pool_of(2, 1))
    request = make_request("b", prompt_tokens=512, limits=LOOSE)
    other = replace(make_request("a", limits=LOOSE), prompt_token_ids=tuple(range(9000, 9064)))
    place(fixture, other, "p1", "d0")
    assert choose(fixture, request).prefill == "p0"
    hold(fixture, "p1", request)
    assert choose(fixture, request).prefill == "p1"


def test_those_who_wait_have_their_place_booked(make_request):
    """So those behind them look elsewhere: list scheduling, in the order of the gate."""
    fixture = Fixture("goodput", pool_of(2, 1))
    place(fixture, make_request("a", prompt_tokens=512, limits=LOOSE), "p0", "d0")
    place(fixture, make_request("b", prompt_tokens=700, limits=LOOSE), "p1", "d0")
    booked = fixture.policy.placement._bookings.booked_s

    def wait(name, now):
        request = make_request(name, prompt_tokens=512, limits=SloLimits(9.0, 0.1))
        assert choose(fixture, request, now) is None
        return [round(booked(worker_id) / READ_512_S) for worker_id in ("p0", "p1")]

    assert wait("c", 0.1) == [1, 0]
    assert wait("d", 0.1) == [1, 1]
    assert wait("e", 0.1) == [2, 1]
    assert wait("c", 0.1) == [1, 0]  # another round
    assert wait("d", 0.2) == [1, 0]  # and another


def test_a_decode_worker_whose_batch_would_miss_its_limit_is_left_out(make_request):
    tight = SloLimits(2.0, 0.0115)  # with one other in the batch a step takes 10.9 ms, with two 12.4 ms
    fixture = Fixture("goodput", pool_of(1, 2))
    writing(fixture, "d0", 2, tight, make_request)
    assert choose(fixture, make_request(limits=tight)).decode == "d1"
    writing(fixture, "d1", 2, tight, make_request)
    assert choose(fixture, make_request(limits=tight)) is None
    # Nor does one with a loose limit of its own go where it would break another's, or one with a tight limit
    # where others' are loose.
    assert choose(fixture, make_request(limits=LOOSE)) is None
    loose = Fixture("goodput", pool_of(1, 1))
    writing(loose, "d0", 2, LOOSE, make_request)
    assert choose(loose, make_request(limits=LOOSE)) is not None
    assert choose(loose, make_request(limits=tight)) is None


def test_a_worker_that_nobody_else_writes_on_harms_nobody(make_request):
    """Though what is promised is a little more than what is possible."""
    fixture = Fixture("goodput", pool_of(1, 1))
    request = make_request(prompt_tokens=512)
    limits = SloLimits(2.0, fixture.estimates.idle(request)[1])
    request = make_request(prompt_tokens=512, limits=limits)
    assert not fixture.estimates.decode(fixture.pool["d0"], request, 0.0, 0.0).is_feasible
    assert choose(fixture, request) is not None


def test_the_shortest_step_decides_between_decode_workers(make_request):
    fixture = Fixture("goodput", pool_of(1, 2))
    writing(fixture, "d0", 3, LOOSE, make_request)
    assert choose(fixture, make_request(limits=LOOSE)).decode == "d1"


def test_one_that_can_no_longer_be_in_time_goes_where_it_harms_nobody(make_request):
    fixture = Fixture("goodput", pool_of(1, 1))
    late = make_request("late", prompt_tokens=512, limits=LOOSE)
    assert choose(fixture, late, now=5.0) is not None
    place(fixture, make_request("a", prompt_tokens=512, limits=LOOSE, arrived_at=5.0), "p0", "d0", now=5.0)
    assert choose(fixture, late, now=5.1) is None
    assert fixture.policy.placement._bookings.booked_s("p0") == 0.0  # nobody has to look elsewhere for it
    assert choose(fixture, late, now=5.5) is not None
    tight = SloLimits(2.0, 0.0115)
    full = Fixture("goodput", pool_of(1, 1))
    writing(full, "d0", 2, tight, make_request)
    assert choose(full, late, now=5.0) is None


def test_late_ones_leave_half_of_a_batch_to_those_in_time(make_request):
    """Steps of d sequences take 8 + 1.4 d ms, about: within 20 ms there is room for eight."""
    limits = SloLimits(2.0, 0.020)

    def with_others(count):
        fixture = Fixture("goodput", pool_of(1, 1))
        writing(fixture, "d0", count, limits, make_request)
        return fixture

    late = make_request("late", prompt_tokens=64, limits=limits)
    in_time = make_request("in-time", prompt_tokens=64, limits=limits, arrived_at=5.0)
    most_late = [choose(with_others(count), late, now=5.0) is not None for count in range(12)].index(False)
    most = [choose(with_others(count), in_time, now=5.0) is not None for count in range(12)].index(False)
    assert 2 <= most_late <= most // 2 + 1 < most


def test_limits_that_nobody_could_keep_do_not_count(make_request):
    fixture = Fixture("goodput", pool_of(1, 1))
    hopeless = SloLimits(2.0, 0.001)
    assert choose(fixture, make_request(limits=hopeless)) is not None
    writing(fixture, "d0", 2, LOOSE, make_request)
    assert choose(fixture, make_request(limits=hopeless)) is not None


def test_an_answer_that_was_interrupted_goes_on_whatever_it_costs(make_request):
    tight = SloLimits(2.0, 0.0115)
    fixture = Fixture("goodput", pool_of(1, 1))
    writing(fixture, "d0", 2, tight, make_request)
    request = make_request(limits=tight)
    assert choose(fixture, request) is None
    assert choose(fixture, request.going_on([1, 2])) is not None


def test_a_mixed_worker_reads_itself_what_it_has_most_of(make_request):
    fixture = Fixture("goodput", pool_of(1, 0, 2))
    writing(fixture, "m1", 1, LOOSE, make_request)
    request = replace(make_request(limits=LOOSE), prompt_token_ids=tuple(range(7000, 7512)))
    assert choose(fixture, request).decode == "m0"
    hold(fixture, "m1", request)
    decision = choose(fixture, request)
    assert (decision.kind, decision.prefill, decision.decode) == (Kind.LOCAL, None, "m1")


def test_it_reads_what_a_busy_prefill_worker_would_read_later(make_request):
    fixture = Fixture("goodput", pool_of(1, 0, 1))
    place(fixture, make_request("a", prompt_tokens=1600, limits=LOOSE), "p0", "m0")
    decision = choose(fixture, make_request(prompt_tokens=512, limits=SloLimits(9.0, 0.1)))
    assert (decision.kind, decision.prefill) == (Kind.LOCAL, None)
    # This one could go before the other, but then that one would be late: no pair is good.
    decision = choose(fixture, make_request(prompt_tokens=512, limits=SloLimits(1.0, 0.1)))
    assert (decision.kind, decision.prefill) == (Kind.DEFLECTED, None)


def test_it_does_not_read_beside_those_who_have_no_slack_for_it(make_request):
    tight = SloLimits(2.0, 0.0135)
    fixture = Fixture("goodput", pool_of(1, 0, 1))
    writing(fixture, "m0", 1, tight, make_request)
    place(fixture, make_request("a", prompt_tokens=512, limits=tight), "p0", "m0")
    assert (
        choose(fixture, make_request(prompt_tokens=256, limits=tight)) is None
    )  # it waits for the prefill worker
    loose = Fixture("goodput", pool_of(1, 0, 1))
    writing(loose, "m0", 1, LOOSE, make_request)
    place(loose, make_request("a", prompt_tokens=512, limits=LOOSE), "p0", "m0")
    assert choose(loose, make_request(prompt_tokens=256, limits=LOOSE)).kind is Kind.LOCAL


def test_nor_if_these_are_to_end_soon(make_request):
    tight = SloLimits(2.0, 0.0135)
    fixture = Fixture("goodput", pool_of(1, 1, 1))
    for _ in range(30):
        fixture.lengths.observe(make_request(), 3)
    writing(fixture, "m0", 1, tight, make_request)
    place(fixture, make_request("a", prompt_tokens=512, limits=tight), "p0", "d0")
    fixture.pool["d0"].suspected = True
    assert choose(fixture, make_request(prompt_tokens=256, limits=tight)) is None


@pytest.mark.parametrize(("answer_tokens", "tpot_s"), [(100, 0.0135), (2, 0.1)])
def test_it_does_not_read_when_others_are_to_be_handed_over(answer_tokens, tpot_s, make_request):
    """They would have no slack beside it, or their answers are too short to make up for a step's wait."""
    limits = SloLimits(2.0, tpot_s)
    fixture = Fixture("goodput", pool_of(1, 0, 1))
    for _ in range(30):
        fixture.lengths.observe(make_request(), answer_tokens)
    place(fixture, make_request("a", prompt_tokens=256, limits=limits), "p0", "m0")
    assert choose(fixture, make_request(prompt_tokens=300, limits=limits)) is None
    roomy = Fixture("goodput", pool_of(1, 0, 1))
    place(roomy, make_request("a", prompt_tokens=256, limits=LOOSE), "p0", "m0")
    assert choose(roomy, make_request(prompt_tokens=300, limits=LOOSE)).kind is Kind.LOCAL


def test_nobody_is_handed_over_to_a_worker_that_will_still_read(make_request):
    """Its steps are as long as its chunks, and a short answer cannot afford to wait for one."""
    fixture = Fixture("goodput", pool_of(1, 0, 2))
    for _ in range(30):
        fixture.lengths.observe(make_request(), 2)
    place(fixture, make_request("a", prompt_tokens=1024, limits=LOOSE), None, "m0")
    writing(fixture, "m1", 2, LOOSE, make_request)
    request = make_request(prompt_tokens=64, limits=LOOSE)
    decision = choose(fixture, request)
    assert decision.decode == "m1"
    fixture.pool["m1"].suspected = True
    assert choose(fixture, request) is None


def test_without_known_speeds_it_is_the_least_loaded_placement(make_request):
    rng = random.Random(3)
    for _ in range(200):
        pool = pool_of(3, 2, 1, model=None)
        for number in range(8):
            worker = rng.choice([*pool])
            tokens = rng.randrange(600) if worker.role is Role.PREFILL else 0
            worker.credit(RequestKey(f"r{number}", 1), tokens, rng.randrange(9))
        expected = LeastLoadedPlacement(pool).choose(make_request(), (), 0.0)
        decision = choose(Fixture("goodput", pool), make_request())
        if expected is None:
            assert decision is None
            continue
        assert pool[decision.prefill].outstanding_tokens == pool[expected.prefill].outstanding_tokens
        assert pool[decision.decode].requests == pool[expected.decode].requests


def test_now_and_then_another_good_one_is_taken(make_request, monkeypatch):
    monkeypatch.setattr(goodput, "EXPLORE", 1.0)
    fixture = Fixture("goodput", pool_of(1, 3))
    writing(fixture, "d0", 2, LOOSE, make_request)
    tight = SloLimits(2.0, 0.0115)
    assert {choose(fixture, make_request(limits=LOOSE)).decode for _ in range(40)} == {"d0", "d1", "d2"}
    assert {choose(fixture, make_request(limits=tight)).decode for _ in range(40)} == {"d1", "d2"}


@st.composite
def fixtures(draw, make_request):
    """Pools with prompts that wait and answers that are written, of all kinds of limits."""
    counts = draw(st.sampled_from([(1, 1, 0), (2, 2, 0), (1, 0, 2), (0, 0, 3), (2, 1, 1), (3, 3, 2)]))
    fixture = Fixture("goodput", pool_of(*counts), seed=draw(st.integers(0, 9)))
    readers, writers = fixture.pool.up(Role.PREFILL), fixture.pool.up(Role.DECODE, Role.MIXED)
    for number in range(draw(st.integers(0, 14))):
        limits = SloLimits(draw(st.sampled_from([0.5, 2.0])), draw(st.sampled_from([0.012, 0.02, 0.1])))
        request = make_request(
            f"r{number}", prompt_tokens=draw(st.sampled_from([30, 300, 900])), limits=limits
        )
        writer = draw(st.sampled_from(writers))
        is_local = writer.role is Role.MIXED and (not readers or draw(st.booleans()))
        reader = None if is_local else draw(st.sampled_from(readers)).worker_id
        place(fixture, request, reader, writer.worker_id, tokens=draw(st.sampled_from([0, 0, 1, 5])))
    return fixture


@given(data=st.data())
def test_a_good_option_is_never_passed_over_for_one_that_is_not(data, make_request):
    fixture = data.draw(fixtures(make_request))
    limits = SloLimits(
        data.draw(st.sampled_from([0.4, 1.0, 5.0])), data.draw(st.sampled_from([0.012, 0.03, 0.1]))
    )
    request = make_request("new", prompt_tokens=data.draw(st.sampled_from([30, 300, 900])), limits=limits)
    now = data.draw(st.sampled_from([0.0, 0.3, 0.9]))
    pool, options = fixture.pool, Options(fixture.estimates, request, now)
    readers = pool.placeable(Role.PREFILL)
    everything = [
        options.pair(reader, options.read(reader), 0.0, writer)
        for reader in readers
        for writer in pool.placeable(Role.DECODE, Role.MIXED)
    ] + [options.local(one, 0.0, could_be_handed_over=bool(readers)) for one in pool.placeable(Role.MIXED)]
    good = {
        (option.prefill and option.prefill.worker_id, option.writer.worker_id): option
        for option in everything
        if not option.does_harm and now + option.ttft_s <= limits.ttft_s
    }
    decision = choose(fixture, request, now)
    if decision is not None and good:
        assert (decision.prefill, decision.decode) in good
    elif good:  # it waits, which it does only for the first of them to read it
        first_s = min(option.ttft_s for option in good.values())
        assert any(
            option.wait_s > goodput.STAGE_S for option in good.values() if option.ttft_s <= 1.02 * first_s
        )


def test_short_answers_are_not_handed_over_where_that_alone_makes_them_late(make_request):
    """A hand-off costs the second token 10 ms; a step takes 9.5 of the 15 that a token may."""
    limits = SloLimits(2.0, 0.015)

    def kind(answer_tokens: int, *, handoff_s: float = 0.010, others: int = 0) -> Kind:
        fixture = Fixture("goodput", pool_of(1, 0, 1))
        for _ in range(40):
            fixture.lengths.observe(make_request(), answer_tokens)
            fixture.estimates.transfers.observe_second_token(handoff_s, 0.0095)
        writing(fixture, "m0", others, limits, make_request)
        request = make_request("new", prompt_tokens=512, limits=limits)
        first_half = replace(request, prompt_token_ids=request.prompt_token_ids[:256])
        hold(fixture, "p0", first_half)  # it would have the first token sooner
        return choose(fixture, request).kind

    assert kind(2) is Kind.LOCAL
    assert kind(40) is Kind.DISAGGREGATED
    assert kind(2, handoff_s=0.001) is Kind.DISAGGREGATED
    assert kind(2, others=3) is Kind.DISAGGREGATED, "others decode there, and have no room for a prompt"


def test_a_late_one_whose_turn_it_is_need_not_leave_room(make_request):
    limits = SloLimits(2.0, 0.020)
    late = make_request("late", prompt_tokens=64, limits=limits)
    fixture = Fixture("goodput", pool_of(1, 1))
    writing(fixture, "d0", 5, limits, make_request)
    assert choose(fixture, late, now=5.0) is None
    fixture.policy.placement._is_its_turn = lambda request_id: request_id == "late"
    assert choose(fixture, late, now=5.0) is not None
