"""Where deployments are brought up and loaded: on this machine, or in virtual time (`simulated.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from bench.goodput.experiment import MeasurePart
from bench.goodput.limits import Typical
from bench.goodput.pace import STEADY, Pace
from bench.goodput.sources import Source
from bench.goodput.visit import Phase, Sent, Show, visiting
from cluster.config import ServeConfig
from cluster.workload.jobs import Row
from cluster.workload.slo import IdleTimes, Limits


class Visited(Protocol):
    """A deployment that is up."""

    async def idle_times(self, source: Source, typical: Typical, show: Show) -> IdleTimes:
        """What requests of a workload take alone."""
        ...

    async def run_at(
        self, source: Source, rate: float, seed: int, limits: Limits, measure: MeasurePart, show: Show
    ) -> tuple[float, list[Row], dict[str, Any]]:
        """Seconds that were judged, the rows of these, and what is to be said of them."""
        ...

    async def run_phases(
        self,
        source: Source,
        phases: Sequence[Phase],
        seed: int,
        limits: Limits,
        measure: MeasurePart,
        show: Show,
    ) -> Sent:
        """What comes of one rate after the other."""
        ...


class Venue(Protocol):
    def visiting(self, config: ServeConfig, show: Show) -> AbstractAsyncContextManager[Visited]:
        """A deployment, from its start to its end. Raises MeasurementError."""
        ...


@dataclass(frozen=True, slots=True)
class ThisMachine:
    """pace: how fast it is at the time."""

    pace: Pace = STEADY

    def visiting(self, config: ServeConfig, show: Show) -> AbstractAsyncContextManager[Visited]:
        return visiting(config, show, self.pace)


THIS_MACHINE = ThisMachine()
