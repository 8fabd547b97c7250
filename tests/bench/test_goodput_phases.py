"""Overload: phases, and when things are normal again."""

from __future__ import annotations

import pytest

from bench.goodput.phases import Phases, judged_overload, recovery_s, timeline
from cluster.workload.jobs import Row, Status
from cluster.workload.slo import Limits, Slo

LIMITS = Limits(1.0, 1.0)
SLO = Slo.fixed(1.0, 1.0)


def row(arrival_s: float, good: bool) -> Row:
    return Row(arrival_s, arrival_s, 10, 1, Status.COMPLETE, 0.5 if good else 2.0, 0.5 if good else 2.0)


def rows(until_s: float, bad: tuple[float, float], start_s: float = 0.0) -> list[Row]:
    """One each half second; those that arrive in `bad` are late."""
    times = [start_s + index / 2 for index in range(int((until_s - start_s) * 2))]
    return [row(time, not bad[0] <= time < bad[1]) for time in times]


def test_at_saturation_and_below_there_is_one_rate() -> None:
    phases = Phases.of(1.0, 2.0, 60.0, 8.0)
    assert phases.phases == ((8.0, 2.0), (60.0, 2.0))
    assert (phases.begin_s, phases.end_s) == (8.0, 68.0)


def test_an_overload_comes_between_two_quiet_phases() -> None:
    phases = Phases.of(3.0, 2.0, 60.0, 8.0)
    assert phases.phases == ((38.0, 1.0), (60.0, 6.0), (60.0, 1.0))
    assert (phases.begin_s, phases.end_s) == (38.0, 98.0)


def test_goodput_is_that_of_requests_which_arrive_in_the_overload() -> None:
    phases = Phases.of(3.0, 2.0, 20.0, 2.0)
    assert (phases.begin_s, phases.end_s) == (12.0, 32.0)
    found = judged_overload(rows(52, (12, 37)), LIMITS, phases, 2.0)
    assert (found.goodput, found.attainment) == (0.0, 0.0)
    found = judged_overload(rows(52, (22, 37)), LIMITS, phases, 2.0)
    assert (found.goodput, found.attainment) == (1.0, 0.5)


def test_recovery_is_when_a_window_is_as_good_as_before() -> None:
    """Half-second steps, so a window of 5 s has 10 requests, of which one may be late."""
    after = rows(60, (30, 42), start_s=30)
    assert recovery_s(after, SLO, 30.0, before=1.0) == pytest.approx(11.5)
    assert recovery_s(after, SLO, 30.0, before=0.5) < 11.5


def test_what_was_never_disturbed_is_normal_at_once() -> None:
    assert recovery_s(rows(60, (0, 0), start_s=30), SLO, 30.0, before=1.0) == 0.0


def test_what_does_not_come_back_is_said_to_be_infinite() -> None:
    assert recovery_s(rows(60, (30, 60), start_s=30), SLO, 30.0, before=1.0) == float("inf")
    assert recovery_s([], SLO, 30.0, before=1.0) == float("inf")


def test_a_lucky_request_is_no_recovery() -> None:
    after = [row(30 + index / 2, good=index in (3, 4, 9)) for index in range(60)]
    assert recovery_s(after, SLO, 30.0, before=1.0) == float("inf")


def test_the_last_few_requests_are_no_window() -> None:
    after = [row(30 + index / 2, good=index >= 55) for index in range(60)]
    assert recovery_s(after, SLO, 30.0, before=1.0) == float("inf")


def test_sparse_requests_need_a_longer_window() -> None:
    after = [row(30 + 4.0 * index, good=index >= 3) for index in range(20)]
    assert recovery_s(after, SLO, 30.0, before=1.0) == pytest.approx(8.0), "9 of 10 from the third on"


def test_only_an_overload_recovers() -> None:
    phases = Phases.of(0.5, 2.0, 20.0, 2.0)
    assert judged_overload(rows(22, (0, 0)), LIMITS, phases, 2.0).recovery_s is None


def test_the_time_line_is_of_the_arrivals_of_five_seconds() -> None:
    found = dict(timeline(rows(30, (10, 15)), LIMITS, begin_s=10.0))
    assert found[0.0] == 1.0
    assert found[5.0] == 0.0
    assert found[2.0] == pytest.approx(0.6)
    assert found[10.0] == 1.0
    assert timeline([], LIMITS, 0.0) == []
