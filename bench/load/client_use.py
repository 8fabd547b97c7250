"""How busy the load generator itself is: a starved client must not be taken for a slow server."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from cluster.workload.jobs import Row

_BEAT_S = 0.01
_MAX_CPU_SHARE = 0.8
_MAX_LAG_S = 0.02


@dataclass(frozen=True, slots=True)
class ClientUse:
    """cpu_share: of one core. lag_p99_s: what the event loop was late to wake up; what it read meanwhile is
    timed late by as much. late_p99_s: by which requests left after they were due."""

    cpu_share: float
    lag_p99_s: float
    late_p99_s: float

    @property
    def warning(self) -> str:
        """Empty if the client had enough time."""
        if self.cpu_share > _MAX_CPU_SHARE:
            return (
                f"the client took {self.cpu_share:.0%} of a core: it may be the bottleneck; send less, or "
                f"from several processes"
            )
        if max(self.lag_p99_s, self.late_p99_s) > _MAX_LAG_S:
            return (
                f"the client was up to {max(self.lag_p99_s, self.late_p99_s) * 1000:.0f} ms late (p99) with "
                f"{self.cpu_share:.0%} of a core: others kept it from running, and times are longer by as "
                f"much; give it a core of its own"
            )
        return ""

    @classmethod
    def worst(cls, several: Sequence[ClientUse]) -> ClientUse:
        """The greatest of each."""
        return cls(
            max(use.cpu_share for use in several),
            max(use.lag_p99_s for use in several),
            max(use.late_p99_s for use in several),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "cpu_share": self.cpu_share,
            "lag_p99_s": self.lag_p99_s,
            "late_p99_s": self.late_p99_s,
            "warning": self.warning or None,
        }


class ClientMeter:
    """`async with` it around a run."""

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._lags: array[float] = array("d")
        self._beat: asyncio.Task[None] | None = None
        self._wall_s = 0.0
        self._cpu_s = 0.0

    async def __aenter__(self) -> Self:
        self._wall_s, self._cpu_s = -self._clock(), -self._cpu_clock()
        self._beat = asyncio.create_task(self._measure_lag())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._beat is not None
        self._beat.cancel()
        self._wall_s += self._clock()
        self._cpu_s += self._cpu_clock()

    def use(self, rows: Sequence[Row]) -> ClientUse:
        """rows: of the run."""
        late = [max(0.0, row.sent_s - row.arrival_s) for row in rows]
        return ClientUse(
            self._cpu_s / max(self._wall_s, 1e-9),
            float(np.percentile(self._lags, 99)) if self._lags else 0.0,
            float(np.percentile(late, 99)) if late else 0.0,
        )

    async def _measure_lag(self) -> None:
        while True:
            before = self._clock()
            await asyncio.sleep(_BEAT_S)
            self._lags.append(max(0.0, self._clock() - before - _BEAT_S))
