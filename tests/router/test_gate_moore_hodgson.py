"""Who is given up so that the others begin in time."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from router.gate.moore_hodgson import FIRMEST, LOOSE, PLAIN, Job, given_up


def by_due(jobs):
    return sorted(jobs, key=lambda job: job.start_by + job.work_s)


def in_time(jobs, start, rate=1.0):
    """Whether all of them begin in time, one after the other."""
    begin = start
    for job in jobs:
        if begin > job.start_by:
            return False
        begin += job.work_s / rate
    return True


def most_in_time(jobs, start):
    """How many can be kept, by trying all choices."""
    return max(
        count
        for count in range(len(jobs) + 1)
        if any(in_time(chosen, start) for chosen in combinations(jobs, count))
    )


# Whole numbers, so that sums are exact.
plain_jobs = st.lists(st.builds(Job, st.integers(1, 9), st.integers(-2, 25)), max_size=8).map(by_due)
any_jobs = st.lists(
    st.builds(Job, st.integers(1, 9), st.integers(-2, 25), st.integers(LOOSE, FIRMEST)), max_size=12
).map(by_due)


@given(jobs=plain_jobs, start=st.integers(0, 5))
def test_on_one_machine_no_choice_keeps_more(jobs, start):
    lost, work_s = given_up(jobs, start)
    kept = [job for index, job in enumerate(jobs) if index not in lost]
    assert in_time(kept, start)
    assert sum(job.work_s for job in kept) == work_s
    assert len(kept) == most_in_time(jobs, start)


@given(jobs=any_jobs, start=st.integers(0, 5), rate=st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_whoever_is_kept_begins_in_time(jobs, start, rate):
    lost, work_s = given_up(jobs, start, rate)
    kept = [job for index, job in enumerate(jobs) if index not in lost]
    assert in_time(kept, start, rate)
    assert sum(job.work_s for job in kept) == work_s


@given(jobs=any_jobs, start=st.integers(0, 5))
def test_a_firm_job_is_kept_if_the_others_that_are_as_firm_leave_room(jobs, start):
    lost, _ = given_up(jobs, start)
    firmest = max((job.hold for job in jobs), default=PLAIN)
    firm = [job for job in jobs if job.hold == firmest]
    if firmest > PLAIN and in_time(firm, start):
        assert all(job.hold < firmest for index, job in enumerate(jobs) if index in lost)


def test_the_largest_is_given_up():
    jobs = [Job(3, 0), Job(9, 4), Job(2, 11)]
    assert given_up(jobs, 0) == ({1}, 5)
    assert given_up(jobs, 0, rate=2) == (set(), 14)


def test_the_weakest_is_given_up_before_the_largest():
    assert given_up([Job(3, 0, LOOSE), Job(9, 2)], 0) == ({0}, 9)
    assert given_up([Job(3, 0), Job(9, 2, PLAIN + 1)], 0) == ({0}, 9)
    assert given_up([Job(3, 0, PLAIN + 2), Job(9, 2, PLAIN + 1)], 0) == ({1}, 3)


def test_nobody_is_given_up_for_one_that_cannot_be_in_time_anyway():
    assert given_up([Job(3, 0), Job(9, -1, FIRMEST)], 0) == ({1}, 3)
    # Even without the first there is no room for the third; so it takes its chance like any other.
    jobs = [Job(1, 0), Job(5, 3, FIRMEST), Job(7, 4, FIRMEST)]
    assert given_up(jobs, 0) == ({2}, 6)
