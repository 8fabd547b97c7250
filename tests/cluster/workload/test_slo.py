"""Limits as they are written, and multiples of what a request takes alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.workload.errors import BadInputError
from cluster.workload.slo import DEFAULT, IdlePoint, IdleTimes, Limit, Limits, Slo


@pytest.mark.parametrize(
    ("text", "ttft", "tpot"),
    [
        ("ttft=2,tpot=60ms", Limit(2.0), Limit(0.06)),
        ("tpot=.5s, ttft=450ms", Limit(0.45), Limit(0.5)),
        ("ttft=3x,tpot=0.03", Limit(3.0, relative=True), Limit(0.03)),
        (DEFAULT, Limit(3.0, relative=True), Limit(1.5, relative=True)),
    ],
)
def test_limits_are_read(text: str, ttft: Limit, tpot: Limit) -> None:
    found = Slo.parse(text)
    assert (found.ttft, found.tpot) == (ttft, tpot)
    assert found.is_relative == (ttft.relative or tpot.relative)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "'' is not understood"),
        ("ttft=2", "tpot is missing"),
        ("ttft=2,tpot=1,ttft=3", "'ttft=3' is not understood"),
        ("ttft=2,itl=1", "'itl=1' is not understood"),
        ("ttft=-2,tpot=1", "'ttft=-2' is not understood"),
        ("ttft=2min,tpot=1", "write it as ttft=2,tpot=60ms"),
        ("ttft=0,tpot=1", "ttft must be greater than 0"),
        ("ttft=2,tpot=0.5x", "0.5 times what a request takes alone, which none can meet"),
    ],
)
def test_limits_that_make_no_sense_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(BadInputError) as refused:
        Slo.parse(text)
    assert complaint in str(refused.value)


IDLE = IdleTimes([IdlePoint(500, 0.5, 0.02), IdlePoint(100, 0.1, 0.01), IdlePoint(1000, 1.5, 0.015)])


@pytest.mark.parametrize(
    ("prompt_tokens", "ttft_s", "tpot_s"),
    [
        (1, 0.1, 0.01),
        (100, 0.1, 0.01),
        (300, 0.3, 0.015),
        (500, 0.5, 0.02),
        (750, 1.0, 0.0175),
        (1500, 2.5, 0.015),  # a TPOT that fell is not believed to fall on
    ],
)
def test_times_alone_lie_on_lines(prompt_tokens: int, ttft_s: float, tpot_s: float) -> None:
    found = IDLE.at(prompt_tokens)
    assert (found.ttft_s, found.tpot_s) == pytest.approx((ttft_s, tpot_s))


def test_one_point_stands_for_all_lengths() -> None:
    assert IdleTimes([IdlePoint(100, 0.1, 0.01)]).at(10_000) == Limits(0.1, 0.01)
    with pytest.raises(ValueError, match="a point at least"):
        IdleTimes([])


@given(st.integers(1, 5000))
def test_multiples_are_of_the_request_alone(prompt_tokens: int) -> None:
    alone = IDLE.at(prompt_tokens)
    limits = Slo.parse("ttft=3x,tpot=50ms").with_idle(IDLE).limits(prompt_tokens)
    assert limits == Limits(3 * alone.ttft_s, 0.05)


def test_multiples_need_something_to_multiply() -> None:
    with pytest.raises(ValueError, match="need idle times"):
        Slo.parse("ttft=3x,tpot=1").limits(100)
    assert Slo.fixed(2.0, 0.1).limits(100) == Limits(2.0, 0.1)


def test_as_json() -> None:
    assert Slo.parse("ttft=3x,tpot=50ms").with_idle(IDLE).to_json() == {
        "ttft": "3x",
        "tpot": "0.05 s",
        "ttft_s": None,
        "tpot_s": 0.05,
        "idle": IDLE.to_json(),
    }
