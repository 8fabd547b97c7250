"""The rule of goodput: against a naive reading of it, and at its edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.workload.jobs import Row, Status
from cluster.workload.judge import BINS, Outcome, judge, length_bin, outcome_of
from cluster.workload.slo import IdlePoint, IdleTimes, Slo

SLO = Slo.fixed(1.0, 0.1)


def row(**changed: Any) -> Row:
    """A good one under SLO: ten tokens, TTFT 1 s, TPOT 0.1 s."""
    values: dict[str, Any] = {
        "arrival_s": 0.0,
        "sent_s": 0.0,
        "prompt_tokens": 100,
        "output_tokens": 11,
        "status": Status.COMPLETE,
        "first_s": 1.0,
        "last_s": 2.0,
    }
    return Row(**values | changed)


@pytest.mark.parametrize(
    ("changed", "outcome"),
    [
        ({}, Outcome.GOOD),  # both limits are inclusive
        ({"first_s": math.nextafter(1.0, 2), "last_s": 1.5}, Outcome.TTFT_MISS),
        ({"last_s": 2.1}, Outcome.TPOT_MISS),
        ({"first_s": 1.5, "last_s": 3.0}, Outcome.BOTH_MISS),
        ({"output_tokens": 1, "last_s": 60.0}, Outcome.GOOD),  # TPOT of one token is 0
        ({"status": Status.REJECTED, "first_s": None, "last_s": None}, Outcome.REJECTED),
        ({"status": Status.TIMED_OUT}, Outcome.TIMED_OUT),
        ({"status": Status.FAILED, "error": "error in the stream"}, Outcome.FAILED),
    ],
)
def test_the_edges_of_the_rule(changed: dict[str, Any], outcome: Outcome) -> None:
    assert outcome_of(row(**changed), SLO) is outcome


def test_limits_may_depend_on_the_prompt() -> None:
    idle = IdleTimes([IdlePoint(100, 0.1, 0.01), IdlePoint(200, 0.2, 0.02)])
    slo = Slo.parse("ttft=3x,tpot=1.5x").with_idle(idle)
    times = {"first_s": 0.44, "last_s": 0.44 + 10 * 0.0224}  # limits at 150 tokens: 0.45 s and 22.5 ms
    assert outcome_of(row(prompt_tokens=150, **times), slo) is Outcome.GOOD
    assert outcome_of(row(prompt_tokens=140, **times), slo) is Outcome.BOTH_MISS


times = st.floats(0.0, 4.0)
statuses = st.sampled_from([*Status, Status.COMPLETE, Status.COMPLETE])


@st.composite
def rows(draw: st.DrawFn) -> Row:
    first = draw(times)
    status = draw(statuses)
    has_token = status is Status.COMPLETE or draw(st.booleans())
    return row(
        prompt_tokens=draw(st.sampled_from([1, 511, 512, 2047, 2048, 8191, 8192, 100_000])),
        output_tokens=draw(st.integers(1, 5)),
        status=status,
        first_s=first if has_token else None,
        last_s=first + draw(times) if has_token else None,
    )


@given(st.lists(rows()), st.floats(0.1, 3), st.floats(0.01, 3), st.floats(1, 100))
def test_as_a_naive_reading_has_it(found: list[Row], ttft_s: float, tpot_s: float, duration_s: float) -> None:
    judged = judge(found, Slo.fixed(ttft_s, tpot_s), duration_s)
    good, by_length = 0, {name: [0, 0] for name in ("<512", "<2k", "<8k", ">=8k")}
    for one in found:
        is_good = one.status == "complete" and one.first_s is not None and one.last_s is not None
        if is_good and one.first_s > ttft_s:
            is_good = False
        if is_good and one.output_tokens > 1:
            is_good = (one.last_s - one.first_s) / (one.output_tokens - 1) <= tpot_s
        n = one.prompt_tokens
        name = "<512" if n < 512 else "<2k" if n < 2048 else "<8k" if n < 8192 else ">=8k"
        good += is_good
        by_length[name][0] += 1
        by_length[name][1] += is_good
    assert judged.good == good
    assert judged.requests == len(found) == sum(judged.outcomes.values())
    assert judged.goodput == good / duration_s
    assert judged.attainment == (good / len(found) if found else 0.0)
    assert {name: [count.requests, count.good] for name, count in judged.by_length.items()} == {
        name: counts for name, counts in by_length.items() if counts[0]
    }
    assert judged.single == sum(one.output_tokens == 1 for one in found if one.status == "complete")


@given(st.lists(rows(), min_size=1), st.floats(0.1, 3), st.floats(0.01, 3))
def test_joint_attainment_lies_where_two_marginals_let_it(
    found: list[Row], ttft_s: float, tpot_s: float
) -> None:
    joint, ttft, tpot = (
        judge(found, Slo.fixed(*limits), 1.0).attainment
        for limits in ((ttft_s, tpot_s), (ttft_s, math.inf), (math.inf, tpot_s))
    )
    complete = sum(one.status == "complete" for one in found) / len(found)
    assert ttft + tpot - complete - 1e-9 <= joint <= min(ttft, tpot)


def test_percentiles_are_of_those_that_have_the_time() -> None:
    judged = judge(
        [
            row(first_s=0.1, last_s=0.2, output_tokens=2, gaps_s=[0.1]),
            row(first_s=0.3, last_s=0.3, output_tokens=1),
            row(first_s=0.5, last_s=9.0, status=Status.FAILED, gaps_s=[0.3]),
            row(first_s=None, last_s=None, status=Status.REJECTED),
        ],
        SLO,
        2.0,
    )
    assert judged.ttft is not None
    assert judged.tpot is not None
    assert judged.itl is not None
    assert judged.ttft.p50 == pytest.approx(0.3)
    assert (judged.tpot.p50, judged.tpot.p99) == pytest.approx((0.1, 0.1))
    assert judged.itl.p50 == pytest.approx(0.2)
    assert judged.output_tokens == 3
    empty = judge([], SLO, 1.0).to_json()
    assert (empty["ttft_s"], empty["attainment"], empty["by_length"]) == (None, 0.0, {})


def test_stages_are_means_and_errors_that_differ_in_numbers_are_one() -> None:
    judged = judge(
        [
            row(stages={"gate": 0.1, "decode": 1.0}),
            row(stages={"gate": 0.3}),
            row(),
            row(status=Status.FAILED, error="HTTP 400: 12 tokens", stages={"gate": 9.0}),
            row(status=Status.FAILED, error="HTTP 400: 13 tokens"),
            row(status=Status.FAILED, error="cut"),
        ],
        SLO,
        1.0,
    )
    assert judged.stages == pytest.approx({"gate": 0.2, "decode": 0.5})
    assert judged.errors == {"HTTP 400: 12 tokens": 2, "cut": 1}


def test_lengths_have_the_bins_of_the_rule() -> None:
    edges = [1, 511, 512, 2047, 2048, 8191, 8192, 10**6]
    assert [BINS.index(length_bin(length)) for length in edges] == [0, 0, 1, 1, 2, 2, 3, 3]
