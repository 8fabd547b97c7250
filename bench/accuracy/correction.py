"""What a cluster at work adds to a profile that was taken of one worker alone.

Workers that share a machine share its caches and its way to memory, and commands, tokens and clients take
time that no step has. How much is seen in one run at a light load, which is not judged: steps of the twin are
stretched, and its messages slowed down, until that run takes as long on the average as it did.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.simulate.twin import Correction
from cluster.workload.jobs import Row, Status
from router.requests import Stage

_ITERATIONS = 4
_LEAST_MESSAGE_S = 1e-5
_MOST = 5.0

_BEFORE_READING = (Stage.GATE.value, Stage.PREFILL_QUEUE.value, Stage.PREFILL.value)


@dataclass(frozen=True, slots=True)
class Spent:
    """Mean seconds of a complete answer: its prompt being read, its tokens after the first, and what of its
    TTFT is neither waiting nor reading."""

    reading: float
    writing: float
    around: float

    @classmethod
    def of(cls, rows: Sequence[Row], stages: Mapping[str, float]) -> Spent | None:
        """stages: means of the complete ones, as the server tells. None where nothing is complete."""
        complete = [row for row in rows if row.status is Status.COMPLETE and row.first_s is not None]
        if not complete or Stage.PREFILL.value not in stages:
            return None
        ttft_s = statistics.fmean(row.first_s or 0.0 for row in complete)
        writing_s = statistics.fmean((row.last_s or 0.0) - (row.first_s or 0.0) for row in complete)
        around_s = ttft_s - sum(stages.get(name, 0.0) for name in _BEFORE_READING)
        return cls(stages[Stage.PREFILL.value], writing_s, around_s)


def correct(
    real: Spent, twin: Callable[[Correction], Spent | None], hops: int, *, are_apart: bool
) -> Correction:
    """twin: what the same requests take in the simulator with that correction. hops: messages before a first
    token. are_apart: workers read or write, none does both; else both are stretched alike, as their steps
    are the same ones."""
    found = Correction()
    for _ in range(_ITERATIONS):
        simulated = twin(found)
        if simulated is None:
            break
        reading = _ratio(real.reading, simulated.reading)
        writing = _ratio(real.writing, simulated.writing)
        if not are_apart:
            reading = writing = _ratio(real.reading + real.writing, simulated.reading + simulated.writing)
        message_s = found.message_s + (real.around - simulated.around) / hops
        found = Correction(
            _within(found.reading * reading),
            _within(found.writing * writing),
            max(_LEAST_MESSAGE_S, message_s),
        )
    return found


def _ratio(real_s: float, simulated_s: float) -> float:
    return real_s / simulated_s if real_s > 0 and simulated_s > 0 else 1.0


def _within(factor: float) -> float:
    return min(max(factor, 1 / _MOST), _MOST)
