"""When requests arrive. Each process is drawn from a generator of random numbers that is passed in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from cluster.workload.errors import BadInputError

Times = npt.NDArray[np.float64]


class Process(StrEnum):
    """How the time from one arrival to the next is distributed."""

    POISSON = "poisson"
    GAMMA = "gamma"
    CONSTANT = "constant"
    TRACE = "trace"


@dataclass(frozen=True, slots=True)
class Arrivals:
    """cv: coefficient of variation of the gaps, of a gamma process; above 1 is burstier than Poisson."""

    process: Process
    cv: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Arrivals:
        """`poisson`, `gamma:CV`, `constant` or `trace`. Raises BadInputError."""
        name, colon, cv = text.partition(":")
        if name not in set(Process) or (name == Process.GAMMA) != bool(colon):
            raise BadInputError(f"--arrivals {text!r}: there are poisson, gamma:CV, constant, trace")
        if name != Process.GAMMA:
            return cls(Process(name))
        try:
            value = float(cv)
        except ValueError:
            value = 0.0
        if not 0 < value <= 100:
            raise BadInputError(f"--arrivals {text!r}: CV must be a number above 0, at most 100")
        return cls(Process.GAMMA, value)

    def __str__(self) -> str:
        return f"gamma:{self.cv:g}" if self.process is Process.GAMMA else self.process.value

    def during(self, rng: np.random.Generator, rate: float, duration_s: float) -> Times:
        """All arrivals in [0, duration_s) at `rate` per second; how many is left to chance."""
        if self.process is Process.CONSTANT:
            return np.arange(math.ceil(duration_s * rate)) / rate
        found: list[Times] = []
        last = 0.0
        while last < duration_s:
            gaps = self._gaps(rng, max(16, int(rate * duration_s))) / rate
            found.append(last + np.cumsum(gaps))
            last = float(found[-1][-1])
        times: Times = np.concatenate(found)
        within: Times = times[times < duration_s]
        return within

    def exactly(self, rng: np.random.Generator, rate: float, count: int) -> Times:
        """`count` arrivals in [0, count / rate): the process, given that so many came in that time."""
        if self.process is Process.CONSTANT:
            return np.arange(count) / rate
        gaps = self._gaps(rng, count + 1)
        times: Times = np.cumsum(gaps)[:-1] / gaps.sum() * (count / rate)
        return times

    def _gaps(self, rng: np.random.Generator, count: int) -> Times:
        """With a mean of 1."""
        match self.process:
            case Process.POISSON:
                return rng.exponential(size=count)
            case Process.GAMMA:
                shape = self.cv**-2
                return rng.gamma(shape, 1 / shape, size=count)
            case _:
                raise ValueError(f"{self} has no random gaps: a trace brings its own arrivals")
