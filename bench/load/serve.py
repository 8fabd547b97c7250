"""What `prelay bench serve` does: one server, several rates and seeds, judged together.

1. Ask the server what it is; draw all workloads; refuse what cannot be served. Nothing is measured before.
2. Measure what requests take alone: relative limits are multiples of it, absolute ones must not be below it.
3. Seed by seed, all rates: what drifts hits all rates alike. Between runs nothing is under way.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.load.client_use import ClientMeter, ClientUse
from bench.load.idle import check_possible, measure_idle, probe_answer, probe_lengths
from bench.load.run import run_load
from bench.load.target import ServerInfo, Target
from cluster.workload.crossing import Headline, headline
from cluster.workload.drawing import WorkloadSpec, workload
from cluster.workload.errors import BadInputError
from cluster.workload.jobs import Job, Row
from cluster.workload.judge import Judgement, judge
from cluster.workload.slo import Slo

TARGETS = (0.9, 0.99)
_IDLE_REQUESTS, _IDLE_REPEATS = 9, 3
"""That are sent alone, at least: in all, and of each length."""
_VOCAB_SIZE = 1000

Show = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class ServePlan:
    """What to measure.

    rates: requests/s; None is a trace's own pace. duration_s or count: judged in each run, after warmup_s
    that are not. vocab_size: None for what the server says. devices: that the server holds, if goodput is to
    be given per device.
    """

    spec: WorkloadSpec
    rates: Sequence[float | None]
    seeds: int
    duration_s: float | None
    count: int | None
    warmup_s: float
    slo: Slo
    timeout_s: float
    send_slo: bool
    vocab_size: int | None
    devices: int | None


@dataclass(frozen=True, slots=True)
class Drawn:
    """What is to be sent in one run. first: of the jobs that are judged, all from there on; they arrive
    within duration_s."""

    rate: float | None
    seed: int
    jobs: Sequence[Job]
    first: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """One rate, one seed. rows: of all jobs, in their order."""

    rate: float | None
    seed: int
    rows: Sequence[Row]
    first: int
    duration_s: float
    client: ClientUse

    @property
    def judged(self) -> Sequence[Row]:
        """Those after the warm-up."""
        return self.rows[self.first :]


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that came of it."""

    plan: ServePlan
    info: ServerInfo
    slo: Slo
    runs: Sequence[Run]

    def of(self, rate: float | None) -> list[Run]:
        """The runs of a rate, by seed."""
        return [run for run in self.runs if run.rate == rate]

    def judgement(self, rate: float | None) -> Judgement:
        """Of all seeds of a rate together."""
        runs = self.of(rate)
        rows = [row for run in runs for row in run.judged]
        return judge(rows, self.slo, sum(run.duration_s for run in runs))

    def headlines(self) -> list[Headline]:
        """Where attainment crosses each of TARGETS; none for a single rate."""
        rates = [rate for rate in self.plan.rates if rate is not None]
        if len(rates) < 2:
            return []
        seeds = []
        for seed in range(self.plan.seeds):
            found = {run.rate: judge(run.judged, self.slo, 1.0) for run in self.runs if run.seed == seed}
            seeds.append({rate: (found[rate].good, found[rate].requests) for rate in rates})
        return [headline(seeds, target) for target in TARGETS]

    def to_json(self) -> dict[str, Any]:
        """What --json prints; of a single rate, its figures also stand at the top."""
        rates = [self._rate_json(rate) for rate in self.plan.rates]
        spec = self.plan.spec
        only = rates[0] if len(rates) == 1 else {}
        return {
            "model": self.info.model,
            "requests_as": self.info.how,
            "arrivals": str(spec.arrivals),
            "time_scale": spec.time_scale,
            "salt": spec.salt,
            "seeds": self.plan.seeds,
            "warmup_s": self.plan.warmup_s,
            "timeout_s": self.plan.timeout_s,
            "slo_sent": self.plan.send_slo,
            "slo": self.slo.to_json(),
            "devices": self.plan.devices,
            "left_out": spec.dataset.left_out,
            **only,
            "client": ClientUse.worst([run.client for run in self.runs]).to_json(),
            "rates": rates,
            "crossings": [found.to_json() for found in self.headlines()],
        }

    def _rate_json(self, rate: float | None) -> dict[str, Any]:
        runs = self.of(rate)
        found = self.judgement(rate)
        client = ClientUse.worst([run.client for run in runs])
        per_device = None if self.plan.devices is None else found.goodput / self.plan.devices
        return {
            "rate": rate,
            **found.to_json(),
            "goodput_per_device": per_device,
            "client_cpu_share": client.cpu_share,
            "client": client.to_json(),
            "by_seed": [
                judge(run.judged, self.slo, run.duration_s).to_json() | {"seed": run.seed} for run in runs
            ],
        }


async def measure(target: Target, plan: ServePlan, show: Show) -> Measured:
    """show: told the share that is done, and what comes. Raises BadInputError, MeasurementError."""
    show(0.0, "asking the server")
    info = await target.check()
    plan = replace(
        plan, spec=replace(plan.spec, vocabulary=vocabulary_of(plan.vocab_size or info.vocab_size))
    )
    drawn = [_draw(plan, rate, seed) for seed in range(plan.seeds) for rate in plan.rates]
    all_jobs = [job for one in drawn for job in one.jobs]
    _check_lengths(all_jobs, info)
    slo = await _with_idle(target, plan, all_jobs, show)
    runs: list[Run] = []
    for number, one in enumerate(drawn):
        pace = "the trace's pace" if one.rate is None else f"{one.rate:g}/s"
        title = f"{pace}, seed {one.seed + 1} of {plan.seeds}"

        def show_run(done: float, said: str, before: int = number, title: str = title) -> None:
            show((before + done) / len(drawn), f"{title}: {said}")

        async with ClientMeter() as meter:
            rows = await run_load(
                target, one.jobs, slo, show_run, timeout_s=plan.timeout_s, send_slo=plan.send_slo
            )
        runs.append(Run(one.rate, one.seed, rows, one.first, one.duration_s, meter.use(rows)))
    return Measured(plan, info, slo, runs)


def vocabulary_of(vocab_size: int | None) -> range:
    """Ids to write prompts with: the lowest are often special tokens."""
    size = vocab_size or _VOCAB_SIZE
    return range(size // 10, size)


def _draw(plan: ServePlan, rate: float | None, seed: int) -> Drawn:
    if plan.duration_s is not None:
        duration_s = plan.duration_s
        jobs = workload(plan.spec, seed, rate, duration_s=plan.warmup_s + duration_s)
        first = bisect_left(jobs, plan.warmup_s, key=lambda job: job.arrival_s)
    else:
        assert plan.count is not None
        if rate is None:
            raise BadInputError("--requests needs a --rate; without one, give a --duration")
        duration_s = plan.count / rate
        first = round(plan.warmup_s * rate)
        jobs = workload(plan.spec, seed, rate, count=first + plan.count)
    if first == len(jobs):
        pace = "the trace's pace" if rate is None else f"a rate of {rate:g}/s"
        raise BadInputError(
            f"at {pace} no request arrives within {duration_s:g} s (seed {seed}); measure for longer"
        )
    return Drawn(rate, seed, jobs, first, duration_s)


def _check_lengths(jobs: Sequence[Job], info: ServerInfo) -> None:
    if info.max_model_len is None:
        return
    lengths = [len(job.prompt_token_ids) + job.output_tokens for job in jobs]
    if too_long := sum(length > info.max_model_len for length in lengths):
        raise BadInputError(
            f"{too_long} of {len(jobs)} requests are longer than the {info.max_model_len} tokens of "
            f"{info.model} (the longest has {max(lengths)}); leave them out with --max-tokens "
            f"{info.max_model_len}, or scale all with --length-scale"
        )


async def _with_idle(target: Target, plan: ServePlan, jobs: Sequence[Job], show: Show) -> Slo:
    lengths = probe_lengths(jobs)
    if not plan.slo.is_relative:
        lengths = sorted({lengths[0], lengths[len(lengths) // 2]})
    idle = await measure_idle(
        target,
        lengths,
        probe_answer(jobs),
        plan.spec.vocabulary,
        plan.spec.salt,
        max(_IDLE_REPEATS, math.ceil(_IDLE_REQUESTS / len(lengths))),
        lambda done, said: show(0.0, said),
    )
    check_possible(plan.slo, idle)
    return plan.slo.with_idle(idle)
