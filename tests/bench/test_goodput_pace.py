"""Seconds of a machine that is now faster and now slower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.goodput.experiment import MeasurePart
from bench.goodput.pace import SAMPLES, Dilation, MachinePace, machine_pace
from bench.goodput.plan import machine_of, plan_of
from bench.goodput.record import Record
from bench.goodput.sources import Source
from bench.goodput.visit import Visit
from cluster.config import demo_model_path
from cluster.workload.arrivals import Arrivals
from cluster.workload.datasets import Synthetic
from cluster.workload.jobs import Job, Row, Status
from cluster.workload.judge import judge
from cluster.workload.slo import IdlePoint, IdleTimes, Limits, Slo
from tests.bench.goodput_bench import experiment
from tests.bench.test_goodput_visit import AtOnce, end, up

SHAPES = Path("bench/shapes")
SECONDS = st.floats(0, 100)
PACES = st.floats(0.5, 4)


@given(pace=PACES, arrival_s=SECONDS, late_s=SECONDS, first_s=SECONDS, more_s=SECONDS, limit_s=SECONDS)
def test_whoever_takes_as_much_longer_as_the_machine_is_the_same(
    pace: float, arrival_s: float, late_s: float, first_s: float, more_s: float, limit_s: float
) -> None:
    dilation = Dilation(pace)
    (job,) = dilation.jobs([Job(arrival_s, [1], 9)])
    times = (arrival_s + late_s, first_s, first_s + more_s)
    sent_s, first, last = (seconds * pace for seconds in times)
    gaps, stages = [more_s * pace], {"prefill": first_s * pace}
    row = dilation.row(Row(job.arrival_s, sent_s, 1, 9, Status.COMPLETE, first, last, gaps, stages))
    found = (row.arrival_s, row.sent_s, row.first_s, row.last_s, *row.gaps_s, row.stages["prefill"])
    assert found == pytest.approx((arrival_s, *times, more_s, first_s))
    limits = dilation.limits(Limits(limit_s, 2 * limit_s))
    assert (limits.ttft_s, limits.tpot_s) == pytest.approx((limit_s * pace, 2 * limit_s * pace))
    (alone,) = dilation.idle(IdleTimes([IdlePoint(8, first, more_s * pace)])).points
    assert (alone.ttft_s, alone.tpot_s) == pytest.approx((first_s, more_s))


def test_who_has_no_token_has_none_in_any_seconds() -> None:
    row = Dilation(2.0).row(Row(4.0, 6.0, 1, 9, Status.REJECTED, error="late"))
    assert row == Row(2.0, 3.0, 1, 9, Status.REJECTED, gaps_s=[], error="late")


async def test_the_pace_is_against_the_beginning_of_the_record(tmp_path: Path) -> None:
    measured = experiment(demo_model_path())
    path = tmp_path / "record.json"

    def times(prefill: float, decode: float) -> MachinePace:
        return MachinePace(Record.open(path, measured, {}), lambda: {"prefill": prefill, "decode": decode})

    assert await times(0.4, 0.01).now() == pytest.approx(1.0)
    assert await times(0.5, 0.0125).now() == pytest.approx(1.25), "also when it goes on from a file"
    assert await times(0.8, 0.01).now() == pytest.approx(2**0.5), "both kinds of steps alike"
    assert await times(0.4, 0.01).now() == pytest.approx(1.0)


async def test_one_sample_says_little_and_many_say_it(tmp_path: Path) -> None:
    record = Record.open(tmp_path / "record.json", experiment(demo_model_path()), {})
    steps = {"prefill": 0.4, "decode": 0.01}
    pace = MachinePace(record, lambda: dict(steps))
    assert await pace.now() == pytest.approx(1.0)
    steps.update(prefill=0.8, decode=0.02)
    found = [await pace.now() for _ in range(SAMPLES)]
    assert found == pytest.approx([1 + count / SAMPLES for count in range(1, SAMPLES + 1)])


class Half:
    """A machine that is half as fast as it was."""

    def __init__(self) -> None:
        self.asked = 0

    async def now(self) -> float:
        self.asked += 1
        return 2.0


@pytest.mark.parametrize(
    ("slo", "pace"), [("ttft=3x,tpot=2x", 2.0), ("ttft=3,tpot=2", 1.0), ("ttft=3x,tpot=2", 1.0)]
)
async def test_only_limits_in_multiples_follow_the_machine(
    slo: str, pace: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_counters(address: str) -> Mapping[str, float]:
        return {}

    monkeypatch.setattr("bench.goodput.visit.read_counters", no_counters)
    source = Source("w", Synthetic((8, 8), (2, 2)), Arrivals.parse("constant"), Slo.parse(slo))
    measure, target, half = MeasurePart(seconds=0.4, warmup_s=0.1, min_requests=1), AtOnce(), Half()
    one = await up(target)
    visit = Visit(one.served, one.target, one.info, half)
    try:
        limits = Limits(3.0, 2.0)
        duration_s, rows, said = await visit.run_at(source, 20.0, 0, limits, measure, lambda text: None)
    finally:
        await end(one)
    assert (duration_s, len(rows), said["pace"]) == (0.4, 8, pace)
    assert half.asked == (pace != 1.0)
    assert target.jobs[-1].arrival_s == pytest.approx(0.45 * pace)
    assert rows[-1].arrival_s == pytest.approx(0.35)
    # The deployment's class has the nominal ones.
    assert set(target.told) == {Limits(6.0, 4.0) if pace != 1.0 else None}
    assert judge(rows, Slo.fixed(3.0, 2.0), duration_s).attainment == 1.0


async def test_real_steps_are_timed_and_their_processes_end(tmp_path: Path) -> None:
    plan = plan_of(experiment(demo_model_path()), SHAPES, tmp_path, tmp_path)
    record = Record.open(tmp_path / "record.json", plan.experiment, {})
    before = set(psutil.Process().children())
    async with machine_pace(plan.references[0].config, 1, record) as pace:
        assert set(psutil.Process().children()) == before, "not before it is asked"
        assert await pace.now() == pytest.approx(1.0), "of itself"
        assert 0 < await pace.now() < 100
        engines = set(psutil.Process().children()) - before
        assert engines
    (line,) = record.others("pace")
    assert set(line["step_s"]) == {"prefill", "decode"}
    assert line["step_s"]["prefill"] > line["step_s"]["decode"] > 0, "512 tokens, and one"
    assert not [
        one for one in engines if one.is_running() and "resource_tracker" not in " ".join(one.cmdline())
    ]


async def test_nothing_is_timed_unless_asked_for(tmp_path: Path) -> None:
    plan = plan_of(experiment(demo_model_path()), SHAPES, tmp_path, tmp_path)
    record = Record.open(tmp_path / "record.json", plan.experiment, {})
    async with machine_of(plan, record) as machine:
        assert await machine.pace.now() == 1.0
    assert record.others("pace") == []
