"""Who lacks what it is due, and how fast readers turn out to be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.gate.drain import DrainRate
from router.gate.fairness import BIN_SHARE, TENANT_SHARE, Fairness, length_bin


def test_bins_of_lengths():
    assert [length_bin(tokens) for tokens in (1, 511, 512, 2047, 2048, 8191, 8192, 10**6)] == [
        0, 0, 1, 1, 2, 2, 3, 3,
    ]  # fmt: skip


def test_nobody_lacks_anything_while_all_are_in_time():
    fairness = Fairness()
    for index in range(40):
        fairness.placed("a", index % 4, 1.0)
    guards = fairness.guards({"a"})
    assert [guards.need("a", bin_, 1.0) for bin_ in range(4)] == [0.0] * 4


def test_a_bin_lacks_what_is_missing_to_its_share_of_what_all_attain():
    fairness = Fairness()
    for _ in range(60):
        fairness.placed("a", 0, 0.1)
    for _ in range(10):
        fairness.placed("a", 3, 1.0)
        fairness.missed(3)
        fairness.missed(0)
    # 70 of 90 were in time, so 20 long ones and the one that waits are due this many; they have had ten.
    due = BIN_SHARE * 70 / 90 * 21
    guards = fairness.guards({"a"})
    assert guards.need("a", 3, 1.0) == pytest.approx(1 - 10 / due)
    assert guards.need("a", 0, 0.1) == 0.0
    # What was handed out is not handed out again.
    needs = [guards.need("a", 3, 1.0) for _ in range(20)]
    assert needs[0] > 0.2
    assert max(needs[10:]) < 0.1
    assert sum(need > 0 for need in needs) < 20
    assert fairness.guards({"a"}).need("a", 3, 1.0) > 0  # but to another look it is


def test_a_bin_that_was_never_seen_is_guarded_once_some_are_in_time():
    fairness = Fairness()
    assert fairness.guards({"a"}).need("a", 3, 1.0) == 0.0
    fairness.placed("a", 0, 0.1)
    assert fairness.guards({"a"}).need("a", 3, 1.0) == 1.0


def test_a_small_tenant_lacks_what_is_missing_to_an_equal_part():
    fairness = Fairness()
    for _ in range(90):
        fairness.placed("large", 0, 1.0)
    for _ in range(10):
        fairness.placed("small", 0, 1.0)
    guards = fairness.guards({"large", "small"})
    due_s = TENANT_SHARE * 100 / 2
    assert guards.need("large", 0, 1.0) == 0.0
    assert guards.need("small", 0, 20.0) == pytest.approx(1 - 10 / due_s)
    assert guards.need("small", 0, 20.0) == pytest.approx(1 - 30 / due_s)
    assert guards.need("small", 0, 20.0) == 0.0
    assert guards.need("new", 0, 1.0) == 1.0
    assert fairness.guards({"small"}).need("small", 0, 1.0) > 0.0  # the other one may come back
    eight_more = {f"t{index}" for index in range(8)}
    assert fairness.guards(eight_more).need("small", 0, 1.0) == 0.0  # now it has more than its part


def test_a_single_tenant_is_never_small():
    fairness = Fairness()
    for _ in range(20):
        fairness.placed("a", 0, 1.0)
    assert fairness.guards({"a"}).need("a", 0, 1.0) == 0.0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.floats(0.01, 9), st.booleans())))
def test_only_the_last_outcomes_count(outcomes):
    fairness, fresh = Fairness(window=8), Fairness(window=8)
    for tenant, length, work_s, in_time in outcomes:
        if in_time:
            fairness.placed(tenant, length, work_s)
        else:
            fairness.missed(length)
    for _ in range(8):
        fairness.placed("z", 2, 1.0)
        fresh.placed("z", 2, 1.0)
    for tenant, length in (("z", 2), ("a", 0), ("b", 3)):
        assert fairness.guards({"a", "b"}).need(tenant, length, 1.0) == pytest.approx(
            fresh.guards({"a", "b"}).need(tenant, length, 1.0)
        )


def run(drain, seconds, readers, work_per_s, waiting=True):
    """Every tenth of a second a reader is free and takes what it can; in between nobody can be placed."""
    for step in range(int(seconds * 10)):
        drain.look(step / 10, readers, blocked=True, waiting=waiting)
        drain.placed(work_per_s / 10)
        drain.look(step / 10, readers, blocked=False, waiting=waiting)


@pytest.mark.parametrize(("readers", "work_per_s"), [(1, 1.0), (4, 4.0), (4, 2.4), (2, 3.2)])
def test_the_share_is_what_is_placed_per_reader(readers, work_per_s):
    drain = DrainRate()
    assert (drain.share, drain.pace) == (1.0, 1.0)
    run(drain, 60, readers, work_per_s)
    assert drain.share == pytest.approx(work_per_s / readers, rel=0.1)
    assert drain.pace == pytest.approx(work_per_s / readers, rel=0.1)


def test_the_pace_is_bounded_as_what_is_far_off_has_other_reasons():
    drain = DrainRate()
    run(drain, 60, 1, 0.2)
    assert drain.share == pytest.approx(0.2, rel=0.5)
    assert drain.pace == 1.0


def test_the_first_of_many_readers_to_be_full_does_not_stand_for_all():
    drain = DrainRate()
    run(drain, 0.3, 16, 8.0)
    assert drain.pace > 0.8
    run(drain, 60, 16, 8.0)
    assert drain.share == pytest.approx(0.5, rel=0.1)


def test_what_finds_free_readers_says_nothing_of_how_fast_they_are():
    drain = DrainRate()
    drain.look(0.0, 2, blocked=False, waiting=True)
    drain.placed(100.0)
    drain.look(5.0, 2, blocked=False, waiting=True)
    drain.placed(100.0)
    assert drain.share == 1.0
    drain.look(6.0, 2, blocked=True, waiting=True)  # now one waited for a second
    drain.placed(2.0)
    assert drain.share == pytest.approx(1.0)
    drain.look(6.0, 2, blocked=False, waiting=False)
    drain.placed(100.0)  # came to free readers again
    assert drain.share == pytest.approx(1.0)
