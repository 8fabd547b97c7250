"""What hand-offs took says what they will take."""

from __future__ import annotations

import random

import pytest

from router.pair_table import Pair
from router.transfer_times import TransferTimes

NEAR, FAR = Pair("p0", "d0"), Pair("p0", "d1")


def test_nothing_is_known_at_first():
    times = TransferTimes()
    assert times.expect_s(NEAR, 1000) == 0.0
    times.observe(NEAR, 1000, 0.02)
    assert times.expect_s(NEAR, 1000) == pytest.approx(0.02)
    assert times.expect_s(NEAR, 0) == 0.0


def test_a_line_over_the_tokens_and_a_factor_for_the_pair():
    times, rng = TransferTimes(), random.Random(1)
    for _ in range(600):
        for pair, factor in ((NEAR, 1.0), (FAR, 3.0)):
            tokens = rng.randrange(50, 4000)
            times.observe(pair, tokens, factor * (0.004 + 1e-5 * tokens) * rng.uniform(0.9, 1.1))
    for tokens in (100, 1000, 4000):
        alone_s = 0.004 + 1e-5 * tokens
        assert times.expect_s(NEAR, tokens) == pytest.approx(alone_s, rel=0.25)
        assert times.expect_s(FAR, tokens) == pytest.approx(3 * alone_s, rel=0.25)
    # A pair that was never used is worth a try; then it is like all together until it says more.
    new = Pair("p9", "d9")
    assert times.expect_s(new, 1000) == 0.0
    times.placed(new)
    assert times.expect_s(NEAR, 1000) < times.expect_s(new, 1000) < times.expect_s(FAR, 1000)
    times.placed(NEAR)  # of which more is known
    assert times.expect_s(NEAR, 1000) == pytest.approx(0.014, rel=0.25)


def test_it_follows_what_changes():
    times = TransferTimes()
    for seconds in (0.01, 0.1):
        for tokens in (100, 300, 500) * 300:
            times.observe(NEAR, tokens, seconds)
    assert times.expect_s(NEAR, 400) == pytest.approx(0.1, rel=0.05)


def test_what_is_hidden_costs_nothing_and_nonsense_is_ignored():
    times = TransferTimes()
    for seconds in (0.0, 0.0, float("nan"), float("inf"), -1.0, 0.0):
        times.observe(NEAR, 500, seconds)
    assert times.expect_s(NEAR, 500) == 0.0


def test_longer_transfers_never_take_less():
    times = TransferTimes()
    for tokens in (100, 1000) * 50:
        times.observe(NEAR, tokens, 1.0 / tokens)
    assert 0 < times.expect_s(NEAR, 100) <= times.expect_s(NEAR, 1000)


def test_pairs_are_bounded():
    times = TransferTimes(max_pairs=10)
    for index in range(100):
        times.observe(Pair("p", f"d{index}"), 100, 0.01 if index < 50 else 0.05)
        times.placed(Pair("q", f"d{index}"))
    assert len(times) <= 10
    # One that was forgotten is not new for ever.
    assert times.expect_s(Pair("p", "d0"), 100) > 0
