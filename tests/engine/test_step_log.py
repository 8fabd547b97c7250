"""Which steps a snapshot tells of."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from engine.latency import StepShape
from engine.step_log import MAX_STEPS, Step, StepLog


@given(st.lists(st.integers(0, 30), max_size=4), st.integers(0, 9))
def test_a_few_of_the_new_ones_each_once_the_latest_last(counts: list[int], seed: int) -> None:
    log = StepLog(random.Random(seed))
    number = 0
    for count in counts:
        for _ in range(count):
            number += 1
            log.add(Step(StepShape((), 1, number), float(number)))
        told = [step.decode_context for step in log.take()]
        assert len(told) == len(set(told)) == min(count, MAX_STEPS)
        assert all(number - count < each <= number for each in told)
        assert told[-1:] == ([number] if count else [])


def test_each_of_those_before_the_latest_is_as_likely() -> None:
    log = StepLog(random.Random(1))
    told: Counter[float] = Counter()
    for _ in range(3000):
        for number in range(31):
            log.add(Step(StepShape((), 1, 1), number))
        told.update(step.seconds for step in log.take()[:-1])
    assert sum(told.values()) == 3000 * (MAX_STEPS - 1)
    assert min(told[number] for number in range(30)) > 240  # of 300
    assert max(told.values()) < 360


def test_the_message_says_all_of_the_shape() -> None:
    log = StepLog(random.Random(0))
    log.add(Step(StepShape(((5, 0), (3, 16)), 2, 70), 0.25))
    (told,) = log.take()
    assert (list(told.new_tokens), list(told.cached_tokens)) == ([5, 3], [0, 16])
    assert (told.decode_requests, told.decode_context, told.seconds) == (2, 70, 0.25)
