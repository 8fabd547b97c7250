"""The order of prompts by urgency."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prelay.v1 import worker_pb2

from engine.router_messages import urgency_of
from engine.urgency import Urgency, rank, slack_s


def order(*prompts: tuple[Urgency | None, float, float], now: float = 10.0) -> list[int]:
    """Places in `prompts` of (urgency, arrived_s, needs_s), who goes first first."""
    return sorted(range(len(prompts)), key=lambda at: rank(*prompts[at], now))


def test_on_time_by_deadline_then_the_late_ones_by_what_they_need() -> None:
    late_long = (Urgency(10.5), 1.0, 2.0)
    late_short = (Urgency(9.0), 2.0, 1.0)
    later = (Urgency(15.0), 3.0, 5.0)
    sooner = (Urgency(12.0), 4.0, 1.0)
    assert order(late_long, late_short, later, sooner) == [3, 2, 1, 0]


def test_priority_comes_before_all_else() -> None:
    late = (Urgency(0.0, priority=1), 5.0, 9.0)
    on_time = (Urgency(10.1, priority=0), 1.0, 0.1)
    assert order(on_time, late, (Urgency(10.1, priority=-1), 0.0, 0.1)) == [1, 0, 2]


def test_an_answer_that_goes_on_was_due_when_it_came() -> None:
    goes_on = (Urgency(None), 9.9, 3.0)
    assert order((Urgency(10.2), 5.0, 0.1), (Urgency(10.0), 5.0, 0.1), goes_on) == [2, 0, 1]


@given(st.lists(st.floats(0, 100), max_size=20), st.floats(0, 100))
def test_who_is_told_nothing_serves_first_come_first_served(needs: list[float], now: float) -> None:
    prompts = [(None, arrived // 3, need) for arrived, need in enumerate(needs)]
    assert order(*prompts, now=now) == list(range(len(needs)))


@given(st.floats(0, 100), st.floats(0, 10), st.floats(0, 100))
def test_exactly_those_with_slack_are_on_time(deadline: float, needs: float, now: float) -> None:
    _, is_late, _, _ = rank(Urgency(deadline), 0.0, needs, now)
    assert is_late == (slack_s(Urgency(deadline), needs, now) < 0)
    assert slack_s(None, needs, now) == slack_s(Urgency(None), needs, now) == math.inf


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (worker_pb2.Prefill(), None),
        (worker_pb2.Prefill(urgency=worker_pb2.Urgency()), Urgency(None)),
        (
            worker_pb2.Reserve(urgency=worker_pb2.Urgency(ttft_left_s=-0.5, tpot_s=0.1, priority=-2)),
            Urgency(6.5, 0.1, -2),
        ),
        (worker_pb2.Prefill(urgency=worker_pb2.Urgency(ttft_left_s=0.0)), Urgency(7.0)),
    ],
)
def test_what_is_left_counts_from_when_the_message_came(
    told: worker_pb2.Prefill | worker_pb2.Reserve, expected: Urgency | None
) -> None:
    assert urgency_of(told, 7.0) == expected
