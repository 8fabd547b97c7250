"""The open loop, against targets that answer as a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from bench.errors import MeasurementError
from bench.load.answer import Answer
from bench.load.client_use import ClientMeter, ClientUse
from bench.load.idle import check_possible, measure_idle, probe_answer, probe_lengths
from bench.load.run import run_load
from bench.load.target import Call
from cluster.workload.jobs import Job, Row, Status
from cluster.workload.slo import IdlePoint, IdleTimes, Limits, Slo

SLO = Slo.fixed(60.0, 60.0)


def jobs(count: int) -> list[Job]:
    """All due at once, with 1, 2, 3 ... tokens of prompt."""
    return [Job(0.0, [7] * (at + 1), at + 1) for at in range(count)]


def quiet(done: float, said: str) -> None:
    """Nobody watches."""


class ScriptedTarget:
    """Answers as `script` does: it gets the job's index and the answer."""

    def __init__(self, script: Callable[[int, Answer], Awaitable[None]]) -> None:
        self.limits: list[Limits | None] = []
        self._script = script

    def prepare(self, job: Job, limits: Limits | None) -> Call:
        index = len(self.limits)
        self.limits.append(limits)

        async def call(answer: Answer) -> None:
            await self._script(index, answer)

        return call


async def test_arrivals_never_wait_for_answers() -> None:
    arrived: list[int] = []
    all_there = asyncio.Event()

    async def answer_when_all_are_there(index: int, answer: Answer) -> None:
        arrived.append(index)
        if len(arrived) == 20:
            all_there.set()
        await all_there.wait()
        answer.tokens(1)
        answer.finish("stop")

    rows = await run_load(ScriptedTarget(answer_when_all_are_there), jobs(20), SLO, quiet)  # type: ignore[arg-type]
    assert arrived == list(range(20))
    assert [row.status for row in rows] == [Status.COMPLETE] * 20


async def test_rows_come_in_the_order_of_jobs_whatever_ends_first() -> None:
    turns = [asyncio.Event() for _ in range(4)]
    turns[3].set()

    async def the_last_first(index: int, answer: Answer) -> None:
        await turns[index].wait()
        answer.tokens(1)
        answer.finish("stop")
        if index:
            turns[index - 1].set()

    rows = await run_load(ScriptedTarget(the_last_first), jobs(4), SLO, quiet)  # type: ignore[arg-type]
    assert [row.prompt_tokens for row in rows] == [1, 2, 3, 4]


async def test_requests_leave_when_they_are_due() -> None:
    async def at_once(index: int, answer: Answer) -> None:
        answer.tokens(1)
        answer.finish("stop")

    due = [Job(0.002 * at, [1], 1) for at in range(10)]
    rows = await run_load(ScriptedTarget(at_once), due, SLO, quiet)  # type: ignore[arg-type]
    assert all(row.sent_s >= row.arrival_s == job.arrival_s for row, job in zip(rows, due, strict=True))


async def test_what_takes_too_long_is_given_up_and_stays_in_the_rows() -> None:
    gone: list[int] = []

    async def begin_and_hang(index: int, answer: Answer) -> None:
        answer.tokens(1)
        try:
            if index != 1:
                await asyncio.Event().wait()
        finally:
            gone.append(index)
        answer.finish("stop")

    target = ScriptedTarget(begin_and_hang)
    rows = await run_load(target, jobs(3), SLO, quiet, timeout_s=0.01)  # type: ignore[arg-type]
    assert [row.status for row in rows] == [Status.TIMED_OUT, Status.COMPLETE, Status.TIMED_OUT]
    assert rows[0].error == "not complete within 0.01 s"
    assert rows[0].ttft_s is not None
    assert sorted(gone) == [0, 1, 2]


@pytest.mark.parametrize("send_slo", [True, False])
async def test_the_server_is_told_the_limits_of_each_request(send_slo: bool) -> None:
    async def fail(index: int, answer: Answer) -> None:
        answer.fail("no")

    target = ScriptedTarget(fail)
    slo = Slo.parse("ttft=3x,tpot=2").with_idle(IdleTimes([IdlePoint(1, 1.0, 1.0), IdlePoint(2, 2.0, 1.0)]))
    await run_load(target, jobs(2), slo, quiet, send_slo=send_slo)  # type: ignore[arg-type]
    assert target.limits == ([Limits(3.0, 2.0), Limits(6.0, 2.0)] if send_slo else [None, None])


async def test_it_says_how_far_it_is_and_how_much_is_good() -> None:
    async def some(index: int, answer: Answer) -> None:
        if index:
            answer.tokens(1)
            answer.finish("stop")
        else:
            answer.fail("no")

    said: list[tuple[float, str]] = []
    await run_load(ScriptedTarget(some), jobs(4), SLO, lambda *what: said.append(what))  # type: ignore[arg-type]
    assert said[-1] == (1.0, "4 of 4 sent, 4 done, 75% of these good")


async def test_nothing_to_send_is_no_trouble() -> None:
    async def never(index: int, answer: Answer) -> None:
        raise AssertionError

    assert await run_load(ScriptedTarget(never), [], SLO, quiet) == []  # type: ignore[arg-type]


# Requests alone


def test_what_is_measured_alone() -> None:
    many = jobs(101)
    assert probe_lengths(many) == [1, 26, 51, 76, 101]
    assert probe_lengths(many[:1] * 9) == [1]
    assert (probe_answer(many), probe_answer(many[:1]), probe_answer(many[90:])) == (51, 2, 64)


async def test_requests_alone_are_alone() -> None:
    under_way = 0
    lengths: list[int] = []

    async def alone(index: int, answer: Answer) -> None:
        nonlocal under_way
        assert under_way == 0
        under_way += 1
        await asyncio.sleep(0)
        answer.tokens(1)
        answer.finish("stop")
        answer.usage(lengths_of[index], 4)
        lengths.append(lengths_of[index])
        under_way -= 1

    lengths_of = [5, 5, 9, 5, 9, 5, 9]
    target = ScriptedTarget(alone)
    idle = await measure_idle(target, [5, 9], 4, range(10, 20), 1, 3, quiet)  # type: ignore[arg-type]
    assert lengths == lengths_of
    assert target.limits == [None] * 7
    assert [point.prompt_tokens for point in idle.points] == [5, 9]


async def test_the_request_that_warms_up_does_not_count() -> None:
    now = 0.0

    async def slow_at_first(index: int, answer: Answer) -> None:
        nonlocal now
        now += 2.0 if index else 100.0
        answer.tokens(1)
        now += 1.0 if index else 50.0
        answer.tokens(1)
        answer.finish("stop")

    target = ScriptedTarget(slow_at_first)
    idle = await measure_idle(target, [5], 2, range(10, 20), 1, 1, quiet, lambda: now)  # type: ignore[arg-type]
    assert list(idle.points) == [IdlePoint(5, 2.0, 1.0)]


async def test_a_request_alone_that_fails_ends_the_measurement() -> None:
    async def fail(index: int, answer: Answer) -> None:
        answer.fail("HTTP 500: out of order")

    with pytest.raises(MeasurementError, match="of 5 tokens, sent alone, failed: HTTP 500: out of order"):
        await measure_idle(ScriptedTarget(fail), [5], 4, range(10, 20), 1, 3, quiet)  # type: ignore[arg-type]


def test_limits_below_what_one_request_takes_alone_are_refused() -> None:
    idle = IdleTimes([IdlePoint(5, 0.5, 0.02), IdlePoint(9, 0.9, 0.01)])
    check_possible(Slo.fixed(0.5, 0.01), idle)
    check_possible(Slo.parse("ttft=1x,tpot=1x"), idle)
    with pytest.raises(MeasurementError, match=r"ttft is 0\.4 s, but a request alone .* takes 0\.5 s"):
        check_possible(Slo.fixed(0.4, 0.01), idle)
    with pytest.raises(MeasurementError, match=r"tpot is 0\.009 s, but .* takes 0\.01 s"):
        check_possible(Slo.fixed(0.5, 0.009), idle)


# The client's own part


class Ticks:
    """A clock that is told how much later each look at it is."""

    def __init__(self, *steps: float) -> None:
        self.now = 0.0
        self._steps = list(steps)

    def __call__(self) -> float:
        self.now += self._steps.pop(0) if self._steps else 0.0
        return self.now


def sent_late(seconds: float) -> Row:
    return Row(1.0, 1.0 + seconds, 1, 1, Status.FAILED)


async def test_the_client_knows_how_busy_it_was() -> None:
    async with ClientMeter(Ticks(0.0, 10.0), Ticks(0.0, 9.0)) as meter:
        pass
    use = meter.use([sent_late(0.003)])
    assert use.cpu_share == pytest.approx(0.9)
    assert use.late_p99_s == pytest.approx(0.003)
    assert "took 90% of a core: it may be the bottleneck" in use.warning


async def test_the_client_knows_how_late_its_loop_was() -> None:
    clock = Ticks(0.0, 0.0, 0.06)
    async with ClientMeter(clock, Ticks()) as meter:
        while clock.now == 0:  # noqa: ASYNC110 (the meter's own beat is what is waited for)
            await asyncio.sleep(0.005)
    use = meter.use([])
    assert use.lag_p99_s == pytest.approx(0.05)
    assert "50 ms late (p99)" in use.warning


def test_a_client_with_time_to_spare_says_nothing() -> None:
    easy, late = ClientUse(0.1, 0.001, 0.002), ClientUse(0.05, 0.002, 0.03)
    assert easy.warning == ""
    assert ClientUse.worst([easy, late]) == ClientUse(0.1, 0.002, 0.03)
    assert "30 ms late" in late.warning
