"""What is kept in reserve follows how many answers are slow that should not be."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.tpot_reserve import MISSES, TpotReserve


def test_there_is_none_while_all_keep_their_limits():
    reserve = TpotReserve()
    for _ in range(100):
        reserve.observe(0.010, 0.020, 0.020)
    assert reserve.factor == 1.0


@pytest.mark.parametrize("spread", [0.05, 0.1])
def test_it_grows_until_few_answers_are_slow(spread):
    """Batches are filled up to the limit less the reserve; times scatter."""
    reserve, dice, slow = TpotReserve(), random.Random(1), []
    for _ in range(20_000):
        expected_s = 0.020 / reserve.factor
        observed_s = expected_s * math.exp(dice.gauss(0, spread))
        reserve.observe(expected_s, 0.020, observed_s)
        slow.append(observed_s > 0.020)
    late = slow[10_000:]
    assert sum(late) / len(late) == pytest.approx(MISSES, abs=0.01)
    assert math.log(reserve.factor) == pytest.approx(1.64 * spread, rel=0.3)


def test_who_was_not_expected_in_time_says_nothing():
    reserve = TpotReserve()
    for _ in range(100):
        reserve.observe(0.021, 0.020, 0.030)
    assert reserve.factor == 1.0


@given(st.lists(st.tuples(*[st.floats(0, math.inf)] * 3)))
def test_it_stays_within_its_bounds(answers):
    reserve = TpotReserve()
    for answer in answers:
        reserve.observe(*answer)
        assert 1.0 <= reserve.factor <= 1.25 + 1e-9
