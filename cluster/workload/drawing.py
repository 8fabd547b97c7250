"""What is sent and when: a function of a specification, a seed and a rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.workload.arrivals import Arrivals, Process, Times
from cluster.workload.datasets import Dataset, Shape, TimedRows
from cluster.workload.errors import BadInputError
from cluster.workload.jobs import Job
from cluster.workload.prompts import PromptWriter


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """vocabulary: token ids that prompts are made of. time_scale: seconds that a second of a trace takes,
    where the trace alone says when requests arrive. salt: changes what prompts say, and nothing else: with
    another one, a server's prefix cache knows none of them."""

    dataset: Dataset
    arrivals: Arrivals
    vocabulary: range
    time_scale: float = 1.0
    salt: int = 0


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request before anybody has written its prompt: all that a simulator needs."""

    arrival_s: float
    shape: Shape


def workload(
    spec: WorkloadSpec,
    seed: int,
    rate: float | None,
    *,
    duration_s: float | None = None,
    count: int | None = None,
) -> list[Job]:
    """Jobs in the order of arrival, with their prompts. Seeds and rates share no prompts.

    Everything else as `arrivals`. Raises BadInputError.
    """
    key = (spec.salt, seed, 0 if rate is None else int(rate * 1e6))
    writer = PromptWriter(key, spec.vocabulary)
    return [
        Job(one.arrival_s, writer.prompt(one.shape), one.shape.output_tokens)
        for one in arrivals(spec, seed, rate, duration_s=duration_s, count=count)
    ]


def arrivals(
    spec: WorkloadSpec,
    seed: int,
    rate: float | None,
    *,
    duration_s: float | None = None,
    count: int | None = None,
) -> list[Arrival]:
    """When requests come, and how long they are, in the order of arrival.

    rate: requests per second; None takes the trace's own times, scaled by spec.time_scale.
    duration_s: all that arrive within it, however many. count: so many, within count / rate seconds. One of
    the two. A trace's own arrivals at a given rate are a run of its rows, as many as there have to be, whose
    time is stretched or shrunk as a whole.

    Raises BadInputError.
    """
    if (duration_s is None) == (count is None):
        raise BadInputError("give either a duration or a number of requests")
    rng = np.random.default_rng((seed, 0 if rate is None else int(rate * 1e6)))
    times, shapes = _drawn(spec, rng, rate, duration_s, count)
    return [Arrival(float(time), shape) for time, shape in zip(times, shapes, strict=True)]


def replay(dataset: TimedRows, seed: int, time_scale: float = 1.0) -> list[Arrival]:
    """All rows of a trace, once, when they came. seed: for timestamps that are coarse."""
    times, shapes = dataset.whole(np.random.default_rng(seed), time_scale)
    return [Arrival(float(time), shape) for time, shape in zip(times, shapes, strict=True)]


def _drawn(
    spec: WorkloadSpec,
    rng: np.random.Generator,
    rate: float | None,
    duration_s: float | None,
    count: int | None,
) -> tuple[Times, list[Shape]]:
    dataset = spec.dataset
    if spec.arrivals.process is Process.TRACE:
        if not isinstance(dataset, TimedRows):
            raise BadInputError("--arrivals trace: the dataset has no arrivals of its own; give poisson")
        if rate is None:
            if duration_s is None:
                raise BadInputError(
                    "a trace at its own pace is sent for a duration, not for a number of requests"
                )
            times, shapes = dataset.during(rng, duration_s, spec.time_scale)
        elif count is None:
            assert duration_s is not None
            times, shapes = dataset.exactly(rng, max(1, round(rate * duration_s)), duration_s)
        else:
            times, shapes = dataset.exactly(rng, count, count / rate)
        return times, list(shapes)
    if rate is None:
        raise BadInputError(f"--arrivals {spec.arrivals}: a rate is needed")
    if count is None:
        assert duration_s is not None
        times = spec.arrivals.during(rng, rate, duration_s)
    else:
        times = spec.arrivals.exactly(rng, rate, count)
    return times, list(dataset.shapes(rng, times))
