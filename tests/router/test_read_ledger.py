"""How long a worker will be busy with its prompts: exact, where what is told of the worker is."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.sequence import RequestKey
from router.read_ledger import ReadLedger

TOKEN_S = 0.001
STEP_TOKENS = 100
STEP_S = STEP_TOKENS * TOKEN_S


class ReadingMachine(RuleBasedStateMachine):
    """A worker that hears at once, reads in order of arrival, in steps of STEP_TOKENS of one prompt at most,
    and takes TOKEN_S for each token; other routers send it prompts, too, of which only snapshots tell."""

    @initialize(is_alone=st.booleans())
    def create(self, is_alone):
        self.is_alone = is_alone  # no other router, nothing cancelled
        self.ledger = ReadLedger()
        self.now = 0.0
        self.count = 0
        self.queue = []  # [key or None, tokens left, tokens]
        self.in_step = 0  # tokens of the first that the step under way has computed
        self.not_told = set()
        self.is_exact = True
        self.is_told = True

    @rule(tokens=st.integers(1, 400))
    def place(self, tokens):
        self.count += 1
        key = RequestKey(f"r{self.count}", 1)
        self.ledger.add(key, tokens, tokens * TOKEN_S, 0, math.inf, self.now)
        self.not_told.add(key)
        self.queue.append([key, tokens, tokens])

    @precondition(lambda self: not self.is_alone)
    @rule(tokens=st.integers(1, 400))
    def another_router_places(self, tokens):
        self.queue.append([None, tokens, tokens])
        self.is_exact = self.is_told = False

    @rule(tokens=st.integers(1, 500))
    def time_passes(self, tokens):
        self.now += tokens * TOKEN_S
        while self.queue and tokens > 0:
            step = min(STEP_TOKENS, self.queue[0][1])
            read = min(tokens, step - self.in_step)
            self.in_step += read
            tokens -= read
            if self.in_step < step:
                break
            self.in_step = 0
            self.queue[0][1] -= step
            if self.queue[0][1] == 0:
                key, _, _ = self.queue.pop(0)
                if key is not None:
                    self.ledger.remove(key)
        self.is_told = self.is_told and self.is_exact

    @precondition(lambda self: not self.is_alone and any(key for key, _, _ in self.queue))
    @rule(data=st.data())
    def cancel(self, data):
        entry = data.draw(st.sampled_from([entry for entry in self.queue if entry[0] is not None]))
        if entry is self.queue[0]:
            self.in_step = 0
        self.queue.remove(entry)
        self.ledger.remove(entry[0])
        self.ledger.remove(entry[0])
        self.is_exact = self.is_told = False

    @rule()
    def snapshot(self):
        left = sum(left for _, left, _ in self.queue)
        self.ledger.snapshot(left, self.not_told, TOKEN_S, STEP_S, self.now)
        self.not_told = set()
        self.is_told = True
        self.is_exact = self.is_exact or not self.queue

    @invariant()
    def the_backlog_is_what_is_left(self):
        backlog_s = self.ledger.backlog_s(self.now, STEP_S)
        left_s = (sum(left for _, left, _ in self.queue) - self.in_step) * TOKEN_S
        if self.is_exact:
            assert backlog_s == pytest.approx(left_s, abs=1e-6)
        if self.is_told:
            assert backlog_s <= left_s + STEP_S + 1e-6
        own_s = sum(tokens for key, _, tokens in self.queue if key is not None) * TOKEN_S
        if all(key is None for key, _, _ in self.queue):
            assert len(self.ledger) == 0
        assert (
            backlog_s >= own_s - max([STEP_S, *(one * TOKEN_S for key, _, one in self.queue if key)]) - 1e-6
        )


TestReading = ReadingMachine.TestCase
TestReading.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)

PROMPTS = st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(-1, 12))


@given(prompts=st.lists(PROMPTS, max_size=8), mine=PROMPTS, spent=st.integers(0, 4))
def test_what_goes_before_a_prompt_is_what_is_more_urgent(prompts, mine, spent):
    """Placed at 0; spent: seconds that the worker has had since."""
    ledger = ReadLedger()
    for index, (read_s, priority, deadline) in enumerate(prompts):
        ledger.add(RequestKey(f"r{index}", 1), 10, read_s, priority, deadline, 0.0)
    total = sum(read_s for read_s, _, _ in prompts)
    largest = max((read_s for read_s, _, _ in prompts), default=0)
    left = max(total - spent, total - max(largest, 1), 0)
    _, priority, deadline = mine
    before = [one for one in prompts if (-one[1], one[2]) <= (-priority, deadline)]
    wait_s = sum(read_s for read_s, _, _ in before) - (total - left)
    wait, spare = ledger.ahead(priority, deadline, spent, 1.0)
    assert wait == pytest.approx(max(wait_s, min(left, 1.0) / 2))
    # Those that it would go before end one after the other; the first to be late says how much they can bear.
    spares, end = [], spent + left
    for read_s, other_priority, other_deadline in sorted(
        prompts, key=lambda one: (-one[1], one[2]), reverse=True
    ):
        if (-other_priority, other_deadline) > (-priority, deadline) and other_deadline >= end:
            spares.append(other_deadline - end)
        end -= read_s
    assert spare == pytest.approx(min(spares, default=math.inf))


def test_a_late_snapshot_is_waited_for_no_longer_than_the_prompts_allow():
    """Time alone reads no prompt whose first token has not come, but one."""
    ledger = ReadLedger()
    for index in range(3):
        ledger.add(RequestKey(f"r{index}", 1), 100, 0.5, 0, math.inf, 0.0)
    ledger.snapshot(300, [RequestKey(f"r{index}", 1) for index in range(3)], TOKEN_S, STEP_S, 0.0)
    assert ledger.backlog_s(0.25, STEP_S) == pytest.approx(1.25)
    assert ledger.backlog_s(60.0, STEP_S) == pytest.approx(1.0)
    ledger.snapshot(120, [], TOKEN_S, STEP_S, 60.0)  # the step under way is taken to be nearly done
    assert ledger.backlog_s(60.0, STEP_S) == pytest.approx(0.6 - STEP_S)


def test_prompts_that_one_step_reads_together_are_done_together():
    ledger = ReadLedger()
    for index in range(3):
        ledger.add(RequestKey(f"r{index}", 1), 10, 0.03, 0, math.inf, 0.0)
    assert ledger.backlog_s(0.09, STEP_S) == 0.0


def test_other_routers_prompts_come_first_and_cost_what_is_usual():
    ledger = ReadLedger()
    ledger.snapshot(1000, [], TOKEN_S, STEP_S, 5.0)
    assert ledger.backlog_s(5.5, STEP_S) == pytest.approx(0.5)
    wait_s, spare_s = ledger.ahead(9, 0.0, 5.5, STEP_S)
    assert (wait_s, spare_s) == (pytest.approx(0.5), math.inf)
    ledger.snapshot(0, [], TOKEN_S, STEP_S, 5.6)
    assert ledger.backlog_s(5.6, STEP_S) == 0.0
