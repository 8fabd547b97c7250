"""From the start of a deployment to its end: what requests take alone, and one rate after the other."""

from __future__ import annotations

import zlib
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench.errors import MeasurementError
from bench.goodput.counters import counted_between, read_counters
from bench.goodput.experiment import MeasurePart
from bench.goodput.limits import SAMPLE, Typical
from bench.goodput.pace import NO_DILATION, STEADY, Dilation, Pace
from bench.goodput.serving import Served, serving
from bench.goodput.sources import Source
from bench.load.client_use import ClientMeter
from bench.load.connect import connect
from bench.load.idle import measure_idle
from bench.load.run import run_load
from bench.load.serve import vocabulary_of
from bench.load.target import ServerInfo, Target
from cluster.config import ServeConfig
from cluster.workload.drawing import WorkloadSpec, workload
from cluster.workload.jobs import Job, Row
from cluster.workload.judge import judge
from cluster.workload.slo import IdleTimes, Limits, Slo

_IDLE_REPEATS = 5
_SEEDS = 1000
"""More than there are rounds."""
_MAX_STRETCH = 4
"""A point may take so many times `seconds` to get its requests."""

Show = Callable[[str], None]
Phase = tuple[float, float]
"""Seconds, and requests per second in them."""


@dataclass(frozen=True, slots=True)
class Visit:
    """A deployment that is up."""

    served: Served
    target: Target
    info: ServerInfo
    pace: Pace = STEADY

    async def dilation(self, source: Source) -> Dilation:
        """For what is sent next; to be asked while nothing runs. Limits in seconds are by the clock."""
        by_multiples = source.slo.ttft.relative and source.slo.tpot.relative
        return Dilation(await self.pace.now() if by_multiples else 1.0)

    @property
    def vocabulary(self) -> range:
        return vocabulary_of(self.info.vocab_size)

    async def idle_times(self, source: Source, typical: Typical, show: Show) -> IdleTimes:
        """What requests of a workload take alone here, nominally."""
        dilation = await self.dilation(source)
        key = zlib.crc32(source.name.encode())
        work = measure_idle(
            self.target,
            sorted(set(typical.lengths)),
            typical.answer,
            self.vocabulary,
            key,
            _IDLE_REPEATS,
            lambda done, said: show(f"{source.name}: {said}"),
        )
        return dilation.idle(await self.served.while_up(work))

    async def run_at(
        self, source: Source, rate: float, seed: int, limits: Limits, measure: MeasurePart, show: Show
    ) -> tuple[float, list[Row], dict[str, Any]]:
        """Seconds that were judged, the rows of these, and what is to be said of them; all nominal."""
        duration_s = window_s(measure, rate)
        # Served twice, a prompt would be found in a cache: what it says depends on where and when, too.
        spec = spec_of(source, self.vocabulary, self.served.grpc, seed, rate)
        jobs = workload(spec, seed, rate, count=num_requests(measure, rate))
        first = bisect_left(jobs, measure.warmup_s, key=lambda job: job.arrival_s)
        if first == len(jobs):
            raise MeasurementError(f"{source.name}: at {rate:.3g}/s nothing arrives within {duration_s:g} s")
        dilation = await self.dilation(source)
        sent = await send(self, jobs, limits, measure.timeout_s, show, dilation)
        rows = [replace(row, arrival_s=row.arrival_s - measure.warmup_s) for row in sent.rows[first:]]
        judged = judge(rows, Slo.fixed(limits.ttft_s, limits.tpot_s), duration_s)
        said = {**judged.to_json(), "counted": sent.counted, "client": sent.client, "pace": sent.pace}
        return duration_s, rows, said

    async def run_phases(
        self,
        source: Source,
        phases: Sequence[Phase],
        seed: int,
        limits: Limits,
        measure: MeasurePart,
        show: Show,
    ) -> Sent:
        """One rate after the other, without a pause; all nominal."""
        jobs: list[Job] = []
        for begin_s, rate, count, own_seed in drawn_phases(phases, seed):
            spec = spec_of(source, self.vocabulary, self.served.grpc, *phases, own_seed)
            drawn = workload(spec, own_seed, rate, count=count)
            jobs += [replace(job, arrival_s=begin_s + job.arrival_s) for job in drawn]
        jobs.sort(key=lambda job: job.arrival_s)
        return await send(self, jobs, limits, measure.timeout_s, show, await self.dilation(source))


@dataclass(frozen=True, slots=True)
class Sent:
    """What came of some jobs: a row each, what the router counted, how busy the client was, and the pace."""

    rows: Sequence[Row]
    counted: dict[str, int]
    client: dict[str, Any]
    pace: float = 1.0


@asynccontextmanager
async def visiting(config: ServeConfig, show: Show, pace: Pace = STEADY) -> AsyncIterator[Visit]:
    """config: see `serving`. A start that fails is tried once more: Ray gives up on a machine that is busy
    for a moment, and hours of measuring are not to end with it. Raises MeasurementError."""
    async with AsyncExitStack() as stack:
        show("starting")
        start = partial(serving, config, lambda line: show(f"starting, {line}"))
        try:
            served = await stack.enter_async_context(start())
        except MeasurementError as error:
            show(f"starting once more, as {error}")
            served = await stack.enter_async_context(start())
        async with connect(f"grpc://{served.grpc}") as target:
            yield Visit(served, target, await served.while_up(target.check()), pace)
        show("stopping")


def spec_of(source: Source, vocabulary: range, *salt: object) -> WorkloadSpec:
    """salt: what makes the contents of prompts differ from those of all other runs."""
    key = zlib.crc32("/".join(map(str, (source.name, *salt))).encode())
    return WorkloadSpec(source.dataset, source.arrivals, vocabulary, salt=key)


def typical_of(source: Source) -> Typical:
    """By a sample that is always the same."""
    spec = replace(spec_of(source, range(100, 200)), arrivals=source.arrivals)
    return Typical.of(workload(spec, 0, 1.0, count=SAMPLE))


def window_s(measure: MeasurePart, rate: float) -> float:
    """How long a rate is judged."""
    return min(max(measure.seconds, measure.min_requests / rate), _MAX_STRETCH * measure.seconds)


def num_requests(measure: MeasurePart, rate: float) -> int:
    """That arrive in the warm-up and the window, as many as the rate says, wherever chance puts them: a point
    whose draw is denser than the rate that it stands for would bend the curve."""
    return max(1, round(rate * (measure.warmup_s + window_s(measure, rate))))


def drawn_phases(phases: Sequence[Phase], seed: int) -> Iterator[tuple[float, float, int, int]]:
    """When each begins, its rate, how many requests arrive in it, and a seed of its own, or two of the same
    rate would be alike. The last request of one may come after the first of the next."""
    begin_s = 0.0
    for index, (seconds, rate) in enumerate(phases):
        if seconds > 0:
            yield begin_s, rate, max(1, round(rate * seconds)), seed + _SEEDS * index
        begin_s += seconds


def least_rate(measure: MeasurePart) -> float:
    """Below which not even the longest window would bring enough requests."""
    return measure.min_requests / (_MAX_STRETCH * measure.seconds)


async def send(
    visit: Visit,
    jobs: Sequence[Job],
    limits: Limits,
    timeout_s: float,
    show: Show,
    dilation: Dilation = NO_DILATION,
) -> Sent:
    """Waits until all are answered, or given up after timeout_s, though none that might still be good. Raises
    MeasurementError if the deployment ends. All but timeout_s is nominal."""
    jobs, limits = dilation.jobs(jobs), dilation.limits(limits)
    slo = Slo.fixed(limits.ttft_s, limits.tpot_s)
    longest_s = max((limits.ttft_s + limits.tpot_s * job.output_tokens for job in jobs), default=0.0)
    timeout_s = max(timeout_s, longest_s)
    before = await read_counters(visit.served.metrics)
    async with ClientMeter() as meter:
        # Those of the deployment's only class are nominal.
        work = run_load(
            visit.target,
            jobs,
            slo,
            lambda done, said: show(said),
            timeout_s=timeout_s,
            send_slo=dilation != NO_DILATION,
        )
        rows = await visit.served.while_up(work)
    after = await read_counters(visit.served.metrics)
    client = meter.use(rows).to_json()
    counted = counted_between(before, after)
    return Sent([dilation.row(row) for row in rows], counted, client, dilation.pace)
