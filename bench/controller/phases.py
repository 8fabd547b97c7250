"""A workload that shifts: phases, each of which has a workload and a rate of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bench.goodput.sources import Source
from cluster.workload.arrivals import Arrivals
from cluster.workload.drawing import Arrival, WorkloadSpec, arrivals
from cluster.workload.errors import BadInputError

_SEEDS = 1000
"""More than there are seeds of one phase."""


@dataclass(frozen=True, slots=True)
class Phase:
    """rate: requests/s, at random times."""

    source: Source
    rate: float
    seconds: float

    def arrivals(self, seed: int) -> list[Arrival]:
        """From 0 on."""
        spec = WorkloadSpec(self.source.dataset, Arrivals.parse("poisson"), range(0))
        return arrivals(spec, seed, self.rate, count=self.count)

    @property
    def count(self) -> int:
        """Requests."""
        return max(1, round(self.rate * self.seconds))


@dataclass(frozen=True, slots=True)
class Shift:
    """Phases, one after the other."""

    phases: Sequence[Phase]

    @classmethod
    def parse(cls, text: str, seconds: float, sources: Mapping[str, Source], there: Sequence[str]) -> Shift:
        """text: WORKLOAD@RATE, WORKLOAD@RATE, ... sources: of those that it names. there: what it could have
        named. Raises BadInputError."""
        phases = []
        for part in text.split(","):
            name, _, rate_text = part.strip().rpartition("@")
            try:
                rate = float(rate_text)
            except ValueError:
                rate = math.nan
            if name not in sources or not (rate > 0 and math.isfinite(rate)):
                raise BadInputError(
                    f"--phases: {part.strip()!r} is not WORKLOAD@RATE, with requests per second and one of "
                    f"the workloads {', '.join(there)}"
                )
            phases.append(Phase(sources[name], rate, seconds))
        return cls(phases)

    @property
    def begins_s(self) -> list[float]:
        """When each of them does."""
        return [sum(one.seconds for one in self.phases[:number]) for number in range(len(self.phases))]

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    def of_phases(self, seed: int) -> list[list[Arrival]]:
        """What comes in each, from its own beginning on."""
        return [phase.arrivals(own_seed) for _, phase, own_seed in self.placed(seed)]

    def placed(self, seed: int) -> list[tuple[float, Phase, int]]:
        """When each begins, and a seed of its own."""
        seeds = range(seed * _SEEDS, (seed + 1) * _SEEDS)
        return list(zip(self.begins_s, self.phases, seeds, strict=False))

    def arrivals(self, seed: int) -> list[Arrival]:
        """All of it."""
        return [
            replace(one, arrival_s=begin_s + one.arrival_s)
            for begin_s, phase, own_seed in self.placed(seed)
            for one in phase.arrivals(own_seed)
        ]
