"""The order in which requests leave the gate of the goodput policy."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.sequence import TokenSampling
from router.gate.goodput import LATE_SHARE, GoodputGateQueue
from router.requests import Request
from router.slo import Slo, SloLimits

TOKEN_S = 0.001


class OneReader:
    """A thousand tokens take a second. busy_until: what it has already."""

    busy_until = 0.0

    only_read = True

    def __len__(self):
        return 1

    def read_s(self, request):
        return TOKEN_S * request.num_tokens

    def wait_s(self, request, now):
        return max(0.0, self.busy_until - now)

    def ttft_s(self, request, now):
        return self.wait_s(request, now) + self.read_s(request)


class OneMixed(OneReader):
    only_read = False


def make(name, tokens=100, arrived_at=0.0, ttft_s=10.0, priority=0, answered=0, tenant=""):
    sampling = TokenSampling(
        temperature=0.0, top_k=0, top_p=1.0, seed=0, max_tokens=100, min_tokens=0, stop_token_ids=frozenset()
    )
    slo = Slo("default", SloLimits(ttft_s, 0.1), priority)
    prompt, tokens_out = tuple(range(tokens)), tuple(range(answered))
    return Request(name, prompt, sampling, (), slo, tenant, arrived_at, arrived_at + 600, tokens_out)


@pytest.fixture
def reader():
    return OneReader()


@pytest.fixture
def gate(reader):
    return GoodputGateQueue(reader)


def add(gate, *requests):
    for request in requests:
        gate.add(request)


def names(gate, now):
    return [request.request_id for request in gate.next(now)]


def all_names(gate, now):
    """All that wait, as they go if there is room for one after the other."""
    order = []
    while found := names(gate, now):
        order.append(found[0])
        gate.placed(found[0])
    return order


def test_an_empty_gate_has_nobody(gate):
    assert names(gate, 0.0) == []
    gate.remove("nobody")
    assert len(gate) == 0


def test_the_earliest_deadline_goes_first(gate):
    add(gate, make("loose", ttft_s=8.0), make("tight", ttft_s=2.0), make("middle", ttft_s=3.0))
    assert names(gate, 0.0) == ["tight", "middle", "loose"]
    assert len(gate) == 3  # they stay


def test_with_one_limit_that_is_by_arrival(gate):
    add(gate, make("later", arrived_at=1.0), make("first", arrived_at=0.0), make("last", arrived_at=2.0))
    assert names(gate, 2.0) == ["first", "later", "last"]


def test_priority_goes_before_any_deadline(gate):
    add(gate, make("a", ttft_s=1.0), make("b", ttft_s=9.0, priority=1), make("c", priority=-1))
    assert names(gate, 0.0) == ["b", "a", "c"]


def test_a_priority_has_what_the_higher_ones_leave(gate):
    add(gate, make("high", 1000, ttft_s=3.0, priority=1), make("loose", 100, ttft_s=9.0))
    add(gate, make("tight", 500, ttft_s=1.2))  # would have to begin before the first one is done
    assert all_names(gate, 0.0) == ["high", "loose", "tight"]


def test_few_are_given_at_a_time_and_none_blocks_the_others(gate):
    add(gate, *(make(f"r{index}", arrived_at=index / 10) for index in range(9)))
    assert names(gate, 1.0) == ["r0", "r1", "r2", "r3"]
    gate.placed("r2")  # only this one found room
    assert names(gate, 1.0) == ["r0", "r1", "r3", "r4"]


def test_late_ones_go_after_those_in_time_shortest_first(gate):
    add(gate, make("late-long", 500, ttft_s=1.0), make("late", 200, ttft_s=1.0), make("tight", ttft_s=3.0))
    assert all_names(gate, 2.0) == ["tight", "late", "late-long"]


def test_a_high_priority_does_not_make_a_late_one_go_before_those_in_time(gate):
    add(
        gate,
        make("late", ttft_s=1.0, priority=5),
        make("late-too", 50, ttft_s=1.0),
        make("tight", ttft_s=3.0),
    )
    assert all_names(gate, 2.0) == ["tight", "late", "late-too"]


def test_when_not_all_can_be_in_time_the_largest_is_given_up(gate):
    add(gate, make("small", 400, ttft_s=2.0), make("large", 900, ttft_s=2.0), make("other", 700, ttft_s=2.0))
    gate.next(0.0)
    # By deadline the large one would be last; but with it even the first would be the last in time.
    assert all_names(gate, 0.3) == ["small", "other", "large"]


def test_whoever_was_given_up_is_taken_again_when_there_is_room(gate):
    add(gate, make("large", 900, ttft_s=2.0), make("a", 700, ttft_s=2.3), make("b", 700, ttft_s=2.3))
    assert names(gate, 0.0) == ["a", "b", "large"]
    for name in ("a", "b"):  # their clients leave
        gate.remove(name)
    add(gate, make("c", 100, ttft_s=5.0))
    assert names(gate, 0.1) == ["large", "c"]


def test_whoever_falls_behind_between_two_plans_lets_the_others_go_first(gate):
    add(gate, make("tight", 999, ttft_s=1.0), make("other", 100))
    assert names(gate, 0.0) == ["tight", "other"]
    assert names(gate, 0.004) == ["other", "tight"]


def test_what_readers_have_already_counts(gate, reader):
    add(gate, make("first", 500, ttft_s=2.0), make("second", 600, ttft_s=2.1))
    reader.busy_until = 1.2  # the first one ends at 1.7, so the second one cannot begin in time
    assert names(gate, 0.0) == ["first", "second"]
    assert gate.outlook(make("third", 300, ttft_s=3.0), 0.0).kept_ttft_s == pytest.approx(1.2 + 0.5 + 0.3)


def test_whose_answer_has_begun_goes_before_all(gate):
    late_but_begun = make("begun", ttft_s=0.5, answered=3)
    add(gate, make("urgent", ttft_s=3.0, priority=9), late_but_begun, make("begun-later", 9, 0.5, answered=1))
    assert names(gate, 2.0) == ["begun", "begun-later", "urgent"]


def test_what_comes_back_stands_where_it_stood(gate):
    first = make("first")
    add(gate, first, make("second", arrived_at=0.5))
    assert names(gate, 1.0)[0] == "first"
    gate.placed("first")
    gate.add(first)
    assert names(gate, 1.1) == ["first", "second"]
    gate.add(first)  # twice is once
    assert len(gate) == 2


def test_one_that_could_never_be_in_time_is_served_soon_unless_others_would_be_late(gate):
    add(gate, make("huge", 3000, ttft_s=1.0), make("loose", 500, ttft_s=20.0))
    assert names(gate, 0.0) == ["huge", "loose"]  # it is wanted at 9 s
    add(gate, make("tight", 500, ttft_s=3.0))
    gate.remove("loose")
    assert names(gate, 0.1) == ["tight", "huge"]
    add(gate, *(make(f"r{index}", 990, ttft_s=9.0) for index in range(7)))
    assert "huge" not in all_names(gate, 0.2)[:-1]


def test_without_knowing_how_long_reading_takes_it_is_by_deadline(gate, reader):
    reader.read_s = lambda request: 1e-9 * request.num_tokens
    add(gate, make("loose", ttft_s=8.0), make("tight", ttft_s=2.0), make("late", 5000, ttft_s=0.5))
    assert all_names(gate, 1.0) == ["tight", "loose", "late"]


def test_the_late_one_that_has_waited_longest_gets_its_share(gate):
    """After `1 / LATE_SHARE` times its own work, and not before; though it is not the shortest."""
    add(gate, make("oldest", 1000, ttft_s=1.5), make("younger", 100, arrived_at=0.1, ttft_s=0.5))
    now, work_s, order = 2.0, 0.0, []
    for index in range(60):
        gate.add(make(f"r{index}", 400, arrived_at=now))
        name = names(gate, now)[0]
        assert gate.is_its_turn("oldest") == (name == "oldest")
        gate.placed(name)
        order.append(name)
        if name == "oldest":
            break
        now, work_s = now + 0.4, work_s + 0.4
    assert "younger" not in order
    assert work_s == pytest.approx(1.0 / LATE_SHARE)
    # It starts over for the next one.
    assert names(gate, now) == [f"r{index}", "younger"]


def test_the_outlook_of_one_that_would_come(gate):
    add(gate, make("low", 800, priority=-1), make("a", 300), make("b", 500, ttft_s=9.0))
    gate.next(0.0)
    outlook = gate.outlook(make("c", 100), 0.5)
    assert outlook.ahead == 1  # only b is due before it; a came with the same deadline, but is longer
    assert outlook.ttft_s == outlook.kept_ttft_s == pytest.approx(0.5 + 0.5 + 0.1)
    # Of two that are due alike, the one that came first goes first.
    assert gate.outlook(make("b2", 500, ttft_s=9.0), 0.0).ahead == 1
    with_one = gate.outlook(make("c", 100), 0.5, with_it=1)
    assert (with_one.ahead, with_one.ttft_s) == (2, pytest.approx(0.5 + 0.5 + 0.2))
    assert gate.outlook(make("c", 100, priority=1), 0.5).ttft_s == pytest.approx(0.5 + 0.1)
    assert gate.outlook(make("c", 100, priority=-2), 0.5).ttft_s == pytest.approx(0.5 + 1.6 + 0.1)
    gate.add(make("begun", 200, ttft_s=0.1, answered=1))
    outlook = gate.outlook(make("c", 100, priority=1), 0.5)
    assert (outlook.ahead, outlook.ttft_s) == (1, pytest.approx(0.5 + 0.201 + 0.1))
    assert len(gate) == 4


def test_the_outlook_counts_those_given_up_apart(gate):
    add(gate, *(make(f"r{index}", 900, arrived_at=index / 100, ttft_s=4.0) for index in range(6)))
    request = make("last", 100, arrived_at=0.1, ttft_s=4.2)
    outlook = gate.outlook(request, 0.1)  # before there is a plan, all are to be kept
    assert outlook.ttft_s == outlook.kept_ttft_s == pytest.approx(6 * 0.9 + 0.1)
    assert outlook.larger_s == pytest.approx(0.9)
    gate.next(0.1)  # the fifth cannot begin at 3.7
    outlook = gate.outlook(request, 0.1)
    assert outlook.ttft_s == pytest.approx(6 * 0.9 + 0.1)
    assert outlook.kept_ttft_s == pytest.approx(4 * 0.9 + 0.1)
    assert (outlook.larger_s, outlook.ahead) == (0.0, 6)  # nobody has to be given up
    first = gate.outlook(make("first", 100, arrived_at=0.1, ttft_s=3.0), 0.1)
    assert (first.ahead, first.ttft_s) == (0, pytest.approx(0.1))


class Anything(RuleBasedStateMachine):
    """Requests that come and go in any order: the gate knows who waits, and gives some of them."""

    def __init__(self):
        super().__init__()
        self.reader = OneReader()
        self.gate = GoodputGateQueue(self.reader)
        self.waiting = {}
        self.now = 0.0
        self.count = 0

    @rule(
        tokens=st.integers(1, 3000),
        ttft_s=st.sampled_from([0.5, 1.0, 4.0]),
        priority=st.integers(-1, 1),
        answered=st.sampled_from([0, 0, 0, 2]),
        tenant=st.sampled_from("ab"),
    )
    def come(self, tokens, ttft_s, priority, answered, tenant):
        self.count += 1
        request = make(f"r{self.count}", tokens, self.now, ttft_s, priority, answered, tenant)
        self.waiting[request.request_id] = request
        self.gate.add(request)

    @rule(choice=st.integers(0, 100))
    def leave(self, choice):
        if self.waiting:
            name = sorted(self.waiting)[choice % len(self.waiting)]
            del self.waiting[name]
            self.gate.remove(name)

    @rule(choice=st.integers(0, 3))
    def place(self, choice):
        found = list(self.gate.next(self.now))
        if found:
            request = found[choice % len(found)]
            self.gate.placed(request.request_id)
            del self.waiting[request.request_id]
            self.reader.busy_until = max(self.reader.busy_until, self.now) + self.reader.read_s(request)

    @rule(choice=st.integers(0, 3))
    def place_and_come_back(self, choice):
        found = list(self.gate.next(self.now))
        if found:
            request = found[choice % len(found)]
            self.gate.placed(request.request_id)
            request = self.waiting[request.request_id] = replace(request, answered=(1,))
            self.gate.add(request)

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.5, 3.0]))
    def wait(self, seconds):
        self.now += seconds

    @rule(tokens=st.integers(1, 3000), with_it=st.integers(0, 2))
    def look(self, tokens, with_it):
        outlook = self.gate.outlook(make("new", tokens, self.now, 4.0), self.now, with_it)
        assert outlook.kept_ttft_s <= outlook.ttft_s + 1e-9
        assert outlook.ttft_s >= self.reader.ttft_s(make("new", tokens), self.now) / 1.7 - 1e-9
        assert outlook.larger_s >= 0

    @invariant()
    def some_of_those_that_wait_are_next(self):
        found = [request.request_id for request in self.gate.next(self.now)]
        assert set(found) <= set(self.waiting)
        assert len(self.gate) == len(self.waiting)
        assert len(set(found)) == len(found) <= 4
        assert (len(found) > 0) == (len(self.waiting) > 0)
        assert 0 <= self.gate.num_late <= len(self.waiting)
        begun = {name for name, request in self.waiting.items() if request.answered}
        assert set(found[: len(begun)]) <= begun


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_who_hangs_up_at_the_head_of_a_line_that_is_stuck_was_not_placed(gate):
    add(gate, *(make(f"r{index}", 100, ttft_s=600.0) for index in range(40)))
    rates = [gate.rate]
    for index in range(20):
        gate.next(0.1 * index)
        gate.remove(f"r{index}")
        rates.append(gate.rate)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0]


@pytest.mark.parametrize("reader", [OneReader(), OneMixed()])
def test_only_of_readers_that_do_nothing_else_a_slow_drain_says_that_they_are_slow(reader):
    gate = GoodputGateQueue(reader)
    for number in range(400):
        gate.add(make(f"r{number}", 100, ttft_s=600.0))
    for number in range(200):  # in 0.15 s each what was to take 0.1 s
        gate.placed(next(iter(gate.next(0.15 * number))).request_id)
        gate.next(0.15 * number)
    alone = make("new", 100, arrived_at=30.0, priority=1)
    expected = 0.15 if reader.only_read else 0.1
    assert gate.outlook(alone, 30.0).ttft_s == pytest.approx(expected, rel=0.1)


def test_late_ones_that_wait_say_nothing_of_how_fast_others_are_taken(gate):
    gate.add(make("late", 100, ttft_s=0.15))
    for step in range(1, 100):
        assert [one.request_id for one in gate.next(step * 0.1)] == ["late"]
    assert gate.num_late == 1
    assert gate.rate == 1.0
