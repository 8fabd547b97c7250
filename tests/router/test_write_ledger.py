"""Who will decode at a time to come: exact, where answers are as long as expected."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.sequence import RequestKey
from router.kv_growth import peak_growth
from router.placed_work import PlacedWork
from router.write_ledger import Batch, WriteLedger

LIMITS = (0.02, 0.05, 0.5)


def work(context=10, tokens=4, tpot_s=0.05, joins_at=0.0, is_local=False, outputs=None, most=None):
    return PlacedWork(
        at=0.0, read_s=0.0, deadline=0.0, priority=0, joins_at=joins_at, is_local=is_local, context=context,
        outputs=outputs or (tokens, tokens, tokens), most_outputs=most or tokens, tpot_s=tpot_s,
    )  # fmt: skip


class WritingMachine(RuleBasedStateMachine):
    """A worker that gives everybody who decodes a token each step; others' sequences never change."""

    @initialize()
    def create(self):
        self.ledger = WriteLedger()
        self.now = 0.0
        self.count = 0
        self.coming, self.moving, self.decoding = {}, {}, {}  # key -> [work, emitted]
        self.joined = set()  # since the last snapshot
        self.others, self.told_others = Batch(0, 0), Batch(0, 0)
        self.least_s = 0.0

    @rule(
        context=st.integers(1, 50), tokens=st.integers(2, 12), limit=st.sampled_from(LIMITS),
        in_s=st.integers(0, 8), is_local=st.booleans(),
    )  # fmt: skip
    def place(self, context, tokens, limit, in_s, is_local):
        self.count += 1
        key = RequestKey(f"r{self.count}", 1)
        placed = work(context, tokens, limit, self.now + in_s, is_local)
        self.ledger.add(key, placed)
        self.coming[key] = [placed, 0]

    @precondition(lambda self: self.coming)
    @rule(data=st.data())
    def read(self, data):
        key = data.draw(st.sampled_from(sorted(self.coming, key=str)))
        answer = self.coming.pop(key)
        answer[1] = 1
        self.ledger.emitted(key, 1)
        if answer[0].is_local:
            self.decoding[key] = answer
            self.joined.add(key)
        else:
            self.moving[key] = answer

    @rule(everybody=st.booleans())
    def step(self, everybody):
        """Those that have arrived join with a token, if everybody does."""
        self.now += 1.0
        if everybody:
            self.joined |= self.moving.keys()
            self.decoding |= self.moving
            self.moving = {}
        for key, answer in list(self.decoding.items()):
            answer[1] += 1
            self.ledger.emitted(key, 1)
            if answer[1] == answer[0].outputs[1]:
                self.release(self.decoding, key)

    @rule(data=st.data())
    def cancel(self, data):
        keys = sorted((*self.coming, *self.moving, *self.decoding), key=str)
        if keys:
            key = data.draw(st.sampled_from(keys))
            self.release(next(one for one in (self.coming, self.moving, self.decoding) if key in one), key)

    def release(self, answers, key):
        del answers[key]
        self.joined.discard(key)
        self.ledger.remove(key)
        self.ledger.remove(key)
        self.ledger.emitted(key, 1)

    @rule(size=st.integers(0, 5))
    def others_change(self, size):
        self.others = Batch(size, 20 * size)

    @rule(least_s=st.sampled_from([0.0, 0.03]))
    def snapshot(self, least_s):
        """What has arrived is in the batch of the worker, though its first token did not come yet."""
        own = [placed.context + emitted for placed, emitted in self.decoding.values()]
        moving = [placed.context + emitted for placed, emitted in self.moving.values()]
        size = len(own) + len(moving) + self.others.size
        self.ledger.snapshot(Batch(size, sum(own) + sum(moving) + self.others.context), least_s)
        self.told_others = self.others
        self.joined = set()
        self.least_s = least_s

    @invariant()
    def the_batch_is_known(self):
        there = [*self.moving.values(), *self.decoding.values()]
        context = sum(placed.context + emitted for placed, emitted in there)
        others = self.told_others
        assert self.ledger.now == Batch(len(there) + others.size, context + others.context)
        assert len(self.ledger) == len(there) + len(self.coming)

    @invariant()
    def the_batch_to_come_is_foreseen(self):
        for steps in (0, 1, 3, 10):
            going_on = [
                placed.context + emitted + steps
                for placed, emitted in self.decoding.values()
                if placed.outputs[1] - emitted > steps
            ]
            moving = [placed.context + emitted for placed, emitted in self.moving.values()]
            coming = [
                placed.context for placed, _ in self.coming.values() if placed.joins_at <= self.now + steps
            ]
            batch = [*going_on, *moving, *coming]
            others = self.told_others
            expected = Batch(len(batch) + others.size, sum(batch) + others.context)
            assert self.ledger.after(steps * 0.5, 0.5, self.now + steps * 0.5) == expected

    @invariant()
    def the_tightest_limit_is_kept(self):
        live = self.coming | self.moving | self.decoding
        limits = [placed.tpot_s for placed, _ in live.values()]
        not_told = [live[key][0].tpot_s for key in live if key not in self.decoding or key in self.joined]
        told = [*not_told, self.least_s] if self.least_s else limits
        assert self.ledger.limit_s(0.01) == min(told, default=math.inf)
        # Nobody can be helped who needs steps that are faster than any.
        assert self.ledger.limit_s(0.04) == min(limits, default=math.inf)

    @invariant()
    def room_is_known(self):
        live = (self.coming | self.moving | self.decoding).values()
        answers = [
            (max(1, placed.outputs[1] - emitted), placed.context + emitted) for placed, emitted in live
        ]
        for context, tokens in ((5, 1), (30, 12)):
            grown = peak_growth([*answers, (tokens, context)])
            assert self.ledger.outgrows(grown - 1, context, tokens)
            assert not self.ledger.outgrows(grown, context, tokens)


TestWriting = WritingMachine.TestCase
TestWriting.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def decoding(ledger, name, placed):
    key = RequestKey(name, 1)
    ledger.add(key, placed)
    ledger.emitted(key, 1)
    ledger.emitted(key, 1)
    return key


def test_who_outlives_what_was_expected_goes_on():
    ledger = WriteLedger()
    key = decoding(ledger, "long", work(context=100, outputs=(2, 4, 20), most=60))
    assert ledger.after(1.0, 1.0, 0.0).size == 1
    assert ledger.after(2.0, 1.0, 0.0).size == 0
    ledger.emitted(key, 2)  # the p50, and not the end: until the p90
    assert ledger.after(15.0, 1.0, 0.0) == Batch(1, 100 + 4 + 15)
    assert ledger.after(16.0, 1.0, 0.0).size == 0
    ledger.emitted(key, 16)  # half as long again, and a little
    assert ledger.after(25.0, 1.0, 0.0).size == 1
    assert ledger.after(26.0, 1.0, 0.0).size == 0
    ledger.emitted(key, 26)  # never beyond the longest possible answer
    assert ledger.after(13.0, 1.0, 0.0).size == 1
    assert ledger.after(14.0, 1.0, 0.0).size == 0


def test_room_is_kept_between_p50_and_p90():
    ledger = WriteLedger()
    key = decoding(ledger, "long", work(context=100, outputs=(2, 6, 14), most=60))
    # Two of ten are written; until the other one gives its 50 back, each takes 4.
    assert (ledger.outgrows(7, 50, 4), ledger.outgrows(8, 50, 4)) == (True, False)
    ledger.emitted(key, 18)  # beyond it, any token may be the last: more than 100 come back then
    assert (ledger.outgrows(1, 50, 4), ledger.outgrows(2, 50, 4)) == (True, False)


def test_no_room_is_kept_for_answers_whose_length_nobody_can_tell():
    ledger = WriteLedger()
    ledger.add(RequestKey("r", 1), replace(work(outputs=(500, 500, 500), most=500), are_learned=False))
    assert (ledger.outgrows(3, 50, 4), ledger.outgrows(4, 50, 4)) == (True, False)
    ledger.remove(RequestKey("r", 1))
    assert not ledger.outgrows(4, 50, 4)


def test_who_is_held_is_still_there():
    ledger = WriteLedger()
    decoding(ledger, "held", work(tokens=6))
    goes_on = decoding(ledger, "goes_on", work(tokens=40, outputs=(40, 40, 40)))
    ledger.emitted(goes_on, 10)
    assert ledger.after(0.0, 1.0, 0.0).size == 2


def test_who_was_held_and_goes_on_does_not_turn_time_back():
    ledger = WriteLedger()
    held = decoding(ledger, "held", work(tokens=30))
    goes_on = decoding(ledger, "goes_on", work(tokens=12))
    ledger.emitted(goes_on, 8)
    ledger.emitted(held, 1)
    assert ledger.after(1.0, 1.0, 0.0).size == 2
    assert ledger.after(2.0, 1.0, 0.0).size == 1


def test_what_all_are_ahead_who_has_just_joined_is_not():
    ledger = WriteLedger()
    decoding(ledger, "first", work(tokens=30))
    ledger.snapshot(Batch(1, 12), 0.05, 0.4)
    assert ledger.ahead_s == 0.4
    key = RequestKey("second", 1)
    ledger.add(key, work(tokens=30))
    assert ledger.ahead_s == 0.4, "its prompt is not read yet"
    ledger.emitted(key, 1)  # on its way
    assert ledger.ahead_s == 0.0
    ledger.emitted(key, 1)
    assert ledger.ahead_s == 0.0
    ledger.snapshot(Batch(2, 24), 0.05, 0.01)
    assert ledger.ahead_s == 0.01


def test_a_worker_is_believed_of_those_that_it_knows():
    """Who is ahead of its limit can afford more than that."""
    ledger = WriteLedger()
    key = RequestKey("r", 1)
    ledger.add(key, work(tokens=30, tpot_s=0.02))
    limits = []
    for _ in range(2):
        ledger.emitted(key, 1)
        limits.append(ledger.limit_s(0.01))
        ledger.snapshot(Batch(1, 12), 0.05)
        limits.append(ledger.limit_s(0.01))
    # Read, and on its way; it decodes, but the worker has not said so; it has.
    assert limits == [0.02, 0.02, 0.02, 0.05]


def test_tokens_that_overtake_the_first_one_count():
    """The first token of the decode worker may come before that of the prefill worker."""
    ledger = WriteLedger()
    key = RequestKey("r", 1)
    ledger.add(key, work(context=10, tokens=5))
    for _ in range(3):
        ledger.emitted(key, 1)
    assert ledger.now == Batch(1, 13)
    assert ledger.after(1.0, 1.0, 0.0) == Batch(1, 14)
    assert ledger.after(2.0, 1.0, 0.0) == Batch(0, 0)


def test_who_is_late_to_join_is_still_expected():
    ledger = WriteLedger()
    ledger.add(RequestKey("r", 1), work(context=10, joins_at=3.0))
    assert ledger.after(2.0, 1.0, 0.5).size == 0
    assert ledger.after(2.0, 1.0, 1.0).size == 1
    assert ledger.after(0.0, 1.0, 60.0).size == 1


@pytest.mark.parametrize(("moving_joined", "others"), [(True, 3), (False, 2)])
def test_who_moves_may_or_may_not_be_in_the_batch(moving_joined, others):
    """What is in doubt counts as ours: a snapshot that is ahead of our tokens invents no other router."""
    ledger = WriteLedger()
    key = RequestKey("moving", 1)
    ledger.add(key, work(context=10))
    ledger.emitted(key, 1)
    ledger.snapshot(Batch(3 + moving_joined, 60 + 11 * moving_joined), 0.0)
    assert ledger.now.size == 1 + others
