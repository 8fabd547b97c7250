"""The open loop: requests leave when they are due, whatever has become of those before them.

1. Every request is serialised, before the clock runs.
2. At its arrival each becomes a task of its own; the loop never waits for an answer.
3. After the last arrival it waits until all are answered or given up, `timeout_s` after each was sent.

So there is a row for every job, and nothing that a server does makes offered load smaller.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from bench.load.answer import Answer
from bench.load.target import Call, Target
from cluster.workload.jobs import TIMEOUT_S, Job, Row, Status
from cluster.workload.judge import Outcome, outcome_of
from cluster.workload.slo import Slo

_SHOW_EVERY_S = 0.25


async def run_load(
    target: Target,
    jobs: Sequence[Job],
    slo: Slo,
    show: Callable[[float, str], None],
    *,
    timeout_s: float = TIMEOUT_S,
    send_slo: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """A row for each job, in the order of jobs, which is that of their arrival.

    show: told, now and then, the share that is done and what is to be said of it. send_slo: tell the server
    the limits of each request.
    """
    calls = [target.prepare(job, slo.limits(len(job.prompt_token_ids)) if send_slo else None) for job in jobs]
    progress = _Progress(len(jobs), slo, show)
    started_at = clock()
    async with asyncio.TaskGroup() as tasks:
        watch = tasks.create_task(progress.keep_showing())
        under_way = []
        for job, call in zip(jobs, calls, strict=True):
            if (wait_s := started_at + job.arrival_s - clock()) > 0:
                await asyncio.sleep(wait_s)
            under_way.append(tasks.create_task(_answered(job, call, started_at, clock, timeout_s, progress)))
            progress.sent += 1
        rows = [await task for task in under_way]
        watch.cancel()
    progress.say()
    return rows


async def _answered(
    job: Job, call: Call, started_at: float, clock: Callable[[], float], timeout_s: float, progress: _Progress
) -> Row:
    answer = Answer(job, started_at, clock)
    try:
        async with asyncio.timeout(timeout_s):
            await call(answer)
    except TimeoutError:
        answer.fail(f"not complete within {timeout_s:g} s", Status.TIMED_OUT)
    row = answer.row()
    progress.answered(row)
    return row


class _Progress:
    """What to say while it runs."""

    def __init__(self, total: int, slo: Slo, show: Callable[[float, str], None]) -> None:
        self.sent = 0
        self._total = total
        self._slo = slo
        self._show = show
        self._done = 0
        self._good = 0

    def answered(self, row: Row) -> None:
        self._done += 1
        self._good += outcome_of(row, self._slo) is Outcome.GOOD

    def say(self) -> None:
        good = f", {self._good / self._done:.0%} of these good" if self._done else ""
        said = f"{self.sent} of {self._total} sent, {self._done} done{good}"
        self._show((self.sent + self._done) / (2 * self._total) if self._total else 1.0, said)

    async def keep_showing(self) -> None:
        while True:
            self.say()
            await asyncio.sleep(_SHOW_EVERY_S)
