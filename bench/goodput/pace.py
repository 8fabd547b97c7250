"""How fast the machine is at the moment, and time in its own seconds.

A machine that is shared is now faster and now slower, by a quarter or more within minutes. Limits that are
multiples of what a request takes alone would mean something else with every deployment that is visited. So
before each point, while nothing runs, the same steps of the engine are timed again on every core. The pace
is what they took the last SAMPLES times over what they took the first SAMPLES times, and seconds of that
point are counted in units of it: requests come so much later, their limits are so much longer, and what was
measured is divided by it. To first order a slow machine then measures what a fast one would. One sample
alone says little of the minute that follows, for single ones scatter by a tenth.

Limits that are given in seconds are meant in seconds: with those the pace is always 1.
"""

from __future__ import annotations

import asyncio
import math
import os
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from bench.goodput.record import Record
from bench.processes import Remote
from cluster.config import ServeConfig
from cluster.workload.jobs import Job, Row
from cluster.workload.slo import IdlePoint, IdleTimes, Limits

_PROMPT = 512
_CONTEXT = 256
_ROUNDS = 2
_TOKENS_A_ROUND = 25
_BLOCK_SIZE = 16

SAMPLES = 5
"""With a point between two of them, some minutes."""

StepTimes = Mapping[str, float]
"""Seconds of a step by its name."""


class Pace(Protocol):
    """Of the machine."""

    async def now(self) -> float:
        """How many times as long as at first everything takes. To be asked while nothing runs."""
        ...


class SteadyPace:
    """Of a machine that is always the same, or of which nothing is known."""

    async def now(self) -> float:
        return 1.0


STEADY = SteadyPace()


class MachinePace:
    """What steps take over what they took when `record` was begun."""

    def __init__(self, record: Record, time_steps: Callable[[], StepTimes]) -> None:
        """time_steps: blocks for a few seconds."""
        self._record = record
        self._time_steps = time_steps
        self._last: deque[StepTimes] = deque(maxlen=SAMPLES)

    async def now(self) -> float:
        for _ in range(max(1, SAMPLES - len(self._last))):  # all of them the first time
            self._last.append(await asyncio.to_thread(self._time_steps))
        taken = {name: statistics.fmean(one[name] for one in self._last) for name in self._last[0]}
        if not self._record.others("pace"):
            self._record.add("pace", {"step_s": taken})
        first: StepTimes = self._record.others("pace")[0]["step_s"]
        return statistics.geometric_mean(taken[name] / first[name] for name in first)


@dataclass(frozen=True, slots=True)
class Dilation:
    """Between nominal seconds and those of the clock, of which there are `pace` to one."""

    pace: float

    def jobs(self, nominal: Sequence[Job]) -> list[Job]:
        """As they are to be sent."""
        return [replace(job, arrival_s=job.arrival_s * self.pace) for job in nominal]

    def limits(self, nominal: Limits) -> Limits:
        """By the clock."""
        return Limits(nominal.ttft_s * self.pace, nominal.tpot_s * self.pace)

    def row(self, row: Row) -> Row:
        """What was measured, nominally."""

        def nominal(seconds: float | None) -> float | None:
            return None if seconds is None else seconds / self.pace

        return replace(
            row,
            arrival_s=row.arrival_s / self.pace,
            sent_s=row.sent_s / self.pace,
            first_s=nominal(row.first_s),
            last_s=nominal(row.last_s),
            gaps_s=[gap / self.pace for gap in row.gaps_s],
            stages={name: seconds / self.pace for name, seconds in row.stages.items()},
        )

    def idle(self, times: IdleTimes) -> IdleTimes:
        """What requests took alone, nominally."""
        return IdleTimes(
            [
                IdlePoint(one.prompt_tokens, one.ttft_s / self.pace, one.tpot_s / self.pace)
                for one in times.points
            ]
        )


NO_DILATION = Dilation(1.0)


@asynccontextmanager
async def machine_pace(config: ServeConfig, num_cores: int, record: Record) -> AsyncIterator[Pace]:
    """By engines of their own, one on each of the first cores, from when it is asked for the first time.
    config: the model's. Raises MeasurementError when asked."""
    with ExitStack() as stack:
        engines: list[Remote] = []

        def start() -> None:
            for core in sorted(os.sched_getaffinity(0))[:num_cores]:
                model = config.model
                engine = Remote(f"pace-{core}", core, serve_steps, str(model.path), model.dtype, model.load)
                stack.callback(engine.stop)
                engines.append(engine)
            for engine in engines:
                engine.take()  # it is ready

        def time_steps() -> StepTimes:
            if not engines:
                start()
            # One after the other, for they share the memory's bandwidth.
            taken = [engine.ask("steps") for engine in engines]
            return {name: statistics.fmean(one[name] for one in taken) for name in taken[0]}

        yield MachinePace(record, time_steps)


def serve_steps(connection: Connection, checkpoint: str, dtype: str, load: str) -> None:
    """The process of one core: answers every question with the mean times of a prefill and a decode step."""
    from engine.config import EngineConfig, ModelConfig
    from engine.engine import Engine
    from engine.latency import StepShape
    from engine.profiler import chunks_of

    model = ModelConfig.from_pretrained(Path(checkpoint))
    length = min(_PROMPT, model.max_position_embeddings)
    config = EngineConfig(
        num_blocks=-(-2 * length // _BLOCK_SIZE),
        block_size=_BLOCK_SIZE,
        max_batch_tokens=length,
        dtype=dtype,
        load=load,
        threads=1,
    )
    runner = Engine.load(Path(checkpoint), config, None, lambda fraction: None).runner
    prefill, decode = (
        chunks_of(shape, _BLOCK_SIZE, model.vocab_size)
        for shape in (StepShape(((length, 0),)), StepShape((), 1, min(_CONTEXT, length)))
    )

    def seconds(step: object) -> float:
        began = time.perf_counter()
        runner.step(step)  # type: ignore[arg-type]
        return time.perf_counter() - began

    seconds(prefill)  # the first one of all takes much longer
    connection.send("ready")
    while connection.recv() is not None:
        taken: dict[str, list[float]] = {"prefill": [], "decode": []}
        for _ in range(_ROUNDS):
            taken["prefill"].append(seconds(prefill))
            taken["decode"] += [seconds(decode) for _ in range(_TOKENS_A_ROUND)]
        connection.send({name: math.fsum(times) / len(times) for name, times in taken.items()})
