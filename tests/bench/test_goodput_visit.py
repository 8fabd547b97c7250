"""One rate on a deployment that is up: what is sent, what is judged, when a request is given up."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from typing import Any

import pytest

from bench.errors import MeasurementError
from bench.goodput import visit
from bench.goodput.counters import counted_between, parse_counters
from bench.goodput.experiment import MeasurePart
from bench.goodput.serving import Served
from bench.goodput.sources import Source
from bench.goodput.visit import Visit, least_rate, send, window_s
from bench.load.answer import Answer
from bench.load.target import Call, ServerInfo
from cluster.workload.arrivals import Arrivals
from cluster.workload.datasets import Synthetic
from cluster.workload.jobs import Job
from cluster.workload.slo import Limits, Slo

LIMITS = Limits(1.0, 1.0)


class AtOnce:
    """A target that answers at once, with as many tokens as were asked for."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.told: list[Limits | None] = []

    async def check(self) -> ServerInfo:
        return ServerInfo("paper", 1024, 1000, "")

    def prepare(self, job: Job, limits: Limits | None) -> Call:
        self.jobs.append(job)
        self.told.append(limits)

        async def call(answer: Answer) -> None:
            answer.tokens(job.output_tokens)
            answer.finish("length")

        return call


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What the router says, one after the other."""
    said: list[dict[str, float]] = [{"admission.accepted.none": 5.0}, {"admission.accepted.none": 8.0}]

    async def read(address: str) -> dict[str, float]:
        return said.pop(0)

    monkeypatch.setattr(visit, "read_counters", read)
    return said


async def up(target: AtOnce, seconds: float = 60.0) -> Visit:
    """A deployment whose process lives for so long."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", f"import time; time.sleep({seconds})", stdin=asyncio.subprocess.PIPE
    )
    served = Served("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", process, deque(["it is tired"]))
    return Visit(served, target, await target.check())


async def end(one: Visit) -> None:
    if one.served._process.returncode is None:
        one.served._process.kill()
    await one.served._process.wait()


async def test_only_what_arrives_after_the_warm_up_is_judged(counters: list[dict[str, float]]) -> None:
    source = Source("w", Synthetic((8, 8), (2, 2)), Arrivals.parse("constant"), Slo.fixed(1.0, 1.0))
    measure, target = MeasurePart(seconds=0.5, warmup_s=0.25, min_requests=1), AtOnce()
    one = await up(target)
    try:
        duration_s, rows, said = await one.run_at(source, 40.0, 0, LIMITS, measure, lambda text: None)
    finally:
        await end(one)
    assert (duration_s, len(target.jobs), len(rows)) == (0.5, 30, 20)
    assert rows[0].arrival_s == pytest.approx(0.0)
    assert rows[-1].arrival_s == pytest.approx(0.475)
    assert said["requests"] == 20
    assert said["counted"] == {"admission.accepted.none": 3}
    assert set(target.told) == {None}, "the limits are those of the deployment's class"


@pytest.mark.parametrize("number", range(3))
async def test_as_many_arrive_as_the_rate_says(counters: list[dict[str, float]], number: int) -> None:
    source = Source("w", Synthetic((8, 8), (2, 2)), Arrivals.parse("poisson"), Slo.fixed(1.0, 1.0))
    measure, target = MeasurePart(seconds=0.5, warmup_s=0.25, min_requests=1), AtOnce()
    one = await up(target)
    try:
        await one.run_at(source, 40.0, number, LIMITS, measure, lambda text: None)
    finally:
        await end(one)
    assert len(target.jobs) == 30


async def test_phases_follow_each_other_and_no_prompt_comes_twice(counters: list[dict[str, float]]) -> None:
    source = Source("w", Synthetic((8, 8), (2, 2)), Arrivals.parse("constant"), Slo.fixed(1.0, 1.0))
    target = AtOnce()
    one = await up(target)
    phases = ((0.2, 20.0), (0.1, 100.0), (0.2, 20.0))
    try:
        sent = await one.run_phases(source, phases, 0, LIMITS, MeasurePart(), lambda text: None)
    finally:
        await end(one)
    times = [row.arrival_s for row in sent.rows]
    assert times == sorted(times)
    assert [sum(a <= time < b for time in times) for a, b in ((0, 0.2), (0.2, 0.3), (0.3, 0.5))] == [4, 10, 4]
    assert len({tuple(job.prompt_token_ids) for job in target.jobs}) == 18


async def test_phases_overlap_in_order_and_those_of_the_same_rate_are_not_alike(
    counters: list[dict[str, float]],
) -> None:
    source = Source("w", Synthetic((8, 80), (2, 2)), Arrivals.parse("poisson"), Slo.fixed(1.0, 1.0))
    target = AtOnce()
    one = await up(target)
    try:
        # 20 requests in each phase, by chance up to 21/20 of its length.
        phases = ((0.195, 100.0), (0.0, 100.0), (0.195, 100.0))
        sent = await one.run_phases(source, phases, 0, LIMITS, MeasurePart(), lambda text: None)
    finally:
        await end(one)
    times = [row.arrival_s for row in sent.rows]
    assert times == sorted(times)
    lengths = [row.prompt_tokens for row in sent.rows]
    assert len(lengths) == 40
    assert lengths[:20] != lengths[20:]


async def test_no_request_is_given_up_that_might_still_be_good(
    counters: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    real = visit.run_load

    async def noted(*arguments: Any, timeout_s: float, **named: Any) -> Any:
        given.append(timeout_s)
        return await real(*arguments, timeout_s=timeout_s, **named)

    monkeypatch.setattr(visit, "run_load", noted)
    counters.extend(counters)
    one = await up(AtOnce())
    try:
        for answer in (3, 300):
            await send(one, [Job(0.0, [1], answer)], Limits(2.0, 0.5), 60.0, lambda text: None)
    finally:
        await end(one)
    assert given == [60.0, 2.0 + 300 * 0.5]


async def test_a_deployment_that_ends_is_told_from_a_slow_one() -> None:
    one = await up(AtOnce(), seconds=0.0)
    with pytest.raises(MeasurementError, match=r"(?s)exit code 0.*it is tired"):
        await one.served.while_up(asyncio.sleep(60))
    await end(one)


def test_low_rates_are_judged_longer_but_not_for_ever() -> None:
    measure = MeasurePart(seconds=60.0, min_requests=40)
    assert window_s(measure, 10.0) == 60.0
    assert window_s(measure, 0.5) == 80.0
    assert window_s(measure, 0.01) == 240.0
    assert window_s(measure, least_rate(measure)) * least_rate(measure) == pytest.approx(40)


def test_counters_are_those_of_requests() -> None:
    text = """
# TYPE prelay_admission_total counter
prelay_admission_total{decision="accepted",reason="none"} 7.0
prelay_admission_total{decision="rejected",reason="late"} 2.0
# TYPE prelay_could_have_served_total counter
prelay_could_have_served_total 1.0
# TYPE prelay_placement_total counter
prelay_placement_total{kind="local"} 3.0
# TYPE prelay_gated_requests gauge
prelay_gated_requests 5.0
"""
    found = parse_counters(text)
    assert found == {
        "admission.accepted.none": 7.0,
        "admission.rejected.late": 2.0,
        "could_have_served": 1.0,
        "placement.local": 3.0,
    }
    before = {"admission.accepted.none": 4.0, "admission.rejected.late": 2.0}
    assert counted_between(before, found) == {
        "admission.accepted.none": 3,
        "could_have_served": 1,
        "placement.local": 3,
    }
