"""Limits of a workload: multiples of what one of its requests takes alone, on the faster of two ways."""

from __future__ import annotations

import pytest

from bench.errors import MeasurementError
from bench.goodput.limits import Idle, Typical
from cluster.workload.jobs import Job
from cluster.workload.slo import IdlePoint, IdleTimes, Limits, Slo

PAIR = IdleTimes([IdlePoint(100, 0.2, 0.010), IdlePoint(500, 0.6, 0.012), IdlePoint(900, 1.0, 0.014)])
MIXED = IdleTimes([IdlePoint(100, 0.1, 0.011), IdlePoint(500, 0.5, 0.013), IdlePoint(900, 0.9, 0.015)])
IDLE = Idle(Typical((100, 500, 900), 32), {"pair": PAIR, "mixed": MIXED})


def test_a_workload_is_known_by_three_lengths() -> None:
    jobs = [
        Job(0.0, [0] * length, answer) for length, answer in zip(range(1, 102), range(1, 102), strict=True)
    ]
    typical = Typical.of(jobs)
    assert typical.lengths == (11, 51, 91)
    assert typical.answer == 32, "of the median, 51, as many as are enough"
    assert Typical.of([Job(0.0, [0], 1)]).answer == 2, "one token has no time per token"


def test_multiples_are_of_the_faster_way_and_of_a_long_prompt() -> None:
    assert IDLE.limits(Slo.parse("ttft=3x,tpot=1.5x")) == Limits(
        pytest.approx(3 * 0.9), pytest.approx(1.5 * 0.014)
    )
    assert IDLE.median == Limits(0.5, 0.012)


def test_seconds_are_what_they_are() -> None:
    assert IDLE.limits(Slo.parse("ttft=2,tpot=20ms")) == Limits(2.0, 0.02)
    assert IDLE.limits(Slo.parse("ttft=2,tpot=2x")) == Limits(2.0, pytest.approx(0.028))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ttft=0.8,tpot=2x", "takes 0.9 s"),
        ("ttft=3x,tpot=13ms", "takes 0.014 s"),
    ],
)
def test_limits_that_not_even_a_request_alone_keeps_are_refused(text: str, words: str) -> None:
    with pytest.raises(MeasurementError, match=words):
        IDLE.limits(Slo.parse(text))
