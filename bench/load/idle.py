"""What requests take while nothing else runs: the measure of relative limits, and of what can be promised."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from bench.errors import MeasurementError
from bench.load.run import run_load
from bench.load.target import Target
from cluster.workload.datasets import Shape
from cluster.workload.jobs import Job, Status
from cluster.workload.prompts import PromptWriter
from cluster.workload.slo import IdlePoint, IdleTimes, Slo

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_MAX_ANSWER = 64
_KEY = 2**31
"""Where a workload has its seed."""
_NO_LIMITS = Slo.fixed(float("inf"), float("inf"))


def probe_lengths(jobs: Sequence[Job]) -> list[int]:
    """Prompt lengths to measure: the shortest, the quartiles, the longest."""
    lengths = [len(job.prompt_token_ids) for job in jobs]
    return sorted({int(length) for length in np.quantile(lengths, _QUANTILES, method="nearest")})


def probe_answer(jobs: Sequence[Job]) -> int:
    """Tokens to ask for: the median of the answers, two at least and not too many."""
    return max(2, min(_MAX_ANSWER, round(statistics.median(job.output_tokens for job in jobs))))


async def measure_idle(
    target: Target,
    lengths: Sequence[int],
    output_tokens: int,
    vocabulary: range,
    salt: int,
    repeats: int,
    show: Callable[[float, str], None],
    clock: Callable[[], float] = time.perf_counter,
) -> IdleTimes:
    """Medians of `repeats` requests of each length, one after the other, after one that warms up.

    salt: as of a workload. Raises MeasurementError if one is not complete.
    """
    writer = PromptWriter((salt, _KEY), vocabulary)
    order = [lengths[0], *(length for _ in range(repeats) for length in lengths)]
    found: dict[int, list[tuple[float, float]]] = {length: [] for length in lengths}
    for number, length in enumerate(order):
        show(number / len(order), f"one request alone, {length} tokens of prompt")
        job = Job(0.0, writer.prompt(Shape(length, output_tokens)), output_tokens)
        (row,) = await run_load(target, [job], _NO_LIMITS, _quiet, send_slo=False, clock=clock)
        if row.status is not Status.COMPLETE or row.ttft_s is None or row.tpot_s is None:
            raise MeasurementError(
                f"a request of {length} tokens, sent alone, {row.status.value}: {row.error}"
            )
        if number:
            found[length].append((row.ttft_s, row.tpot_s))
    return IdleTimes(
        [
            IdlePoint(length, statistics.median(t for t, _ in times), statistics.median(t for _, t in times))
            for length, times in found.items()
        ]
    )


def check_possible(slo: Slo, idle: IdleTimes) -> None:
    """Raises MeasurementError for limits that not even the request that is fastest alone can meet."""
    for name, limit, alone_s in (
        ("ttft", slo.ttft, min(point.ttft_s for point in idle.points)),
        ("tpot", slo.tpot, min(point.tpot_s for point in idle.points)),
    ):
        if not limit.relative and limit.value < alone_s:
            raise MeasurementError(
                f"--slo: {name} is {limit.value:g} s, but a request alone on this server takes "
                f"{alone_s:.3g} s: none could be good; give at least that, or a multiple such as {name}=2x"
            )


def _quiet(done: float, said: str) -> None:
    """One request is no progress to speak of."""
