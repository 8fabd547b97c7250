"""An overload: its phases, and what is to be seen in the requests that were sent meanwhile.

At saturation and below, a steady run; beyond it, a run in three phases: half of saturation, so many times
saturation, half of it again. Recovery is how long after the end of the overload a sliding window of arrivals
attains 90 % again of what the first phase attained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.workload.jobs import Row
from cluster.workload.judge import Outcome, judge, outcome_of
from cluster.workload.slo import Limits, Slo

_AROUND = 0.5
"""Of saturation, before and after an overload."""
_NORMAL = 0.9
_WINDOW_S = 5.0
_WINDOW_REQUESTS = 10


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds and requests per second, one after the other; what is judged is the one at `judged`."""

    phases: tuple[tuple[float, float], ...]
    judged: int

    @classmethod
    def of(cls, factor: float, saturation: float, seconds: float, warmup_s: float) -> Phases:
        rate, around = factor * saturation, _AROUND * saturation
        if factor <= 1:
            return cls(((warmup_s, rate), (seconds, rate)), 1)
        return cls(((warmup_s + seconds / 2, around), (seconds, rate), (seconds, around)), 1)

    @property
    def begin_s(self) -> float:
        """Of what is judged."""
        return sum(seconds for seconds, _ in self.phases[: self.judged])

    @property
    def end_s(self) -> float:
        return self.begin_s + self.phases[self.judged][0]


@dataclass(frozen=True, slots=True)
class Overload:
    """What came of one factor, in one round. recovery_s: None without an overload, infinite if it did not
    come back as long as it was looked at."""

    goodput: float
    attainment: float
    recovery_s: float | None


def judged_overload(rows: Sequence[Row], limits: Limits, phases: Phases, warmup_s: float) -> Overload:
    """rows: all of the run, in the order of arrival."""
    begin, end = phases.begin_s, phases.end_s
    slo = Slo.fixed(limits.ttft_s, limits.tpot_s)
    within = judge([row for row in rows if begin <= row.arrival_s < end], slo, end - begin)
    recovery = None
    if len(phases.phases) > 2:
        before = judge([row for row in rows if warmup_s <= row.arrival_s < begin], slo, 1.0).attainment
        recovery = recovery_s([row for row in rows if row.arrival_s >= end], slo, end, before)
    return Overload(within.goodput, within.attainment, recovery)


def recovery_s(rows: Sequence[Row], slo: Slo, end_s: float, before: float) -> float:
    """Seconds from the end of the overload to the first arrival from which on a window (5 s, or 10 requests
    if these take longer) attains _NORMAL times `before`; infinite if there is none. rows: that arrived after
    it."""
    good = [outcome_of(row, slo) is Outcome.GOOD for row in rows]
    for first, row in enumerate(rows):
        last = first + _WINDOW_REQUESTS
        while last < len(rows) and rows[last].arrival_s < row.arrival_s + _WINDOW_S:
            last += 1
        window = good[first:last]
        if len(window) < min(_WINDOW_REQUESTS, len(rows)):
            break
        if sum(window) >= _NORMAL * before * len(window):
            return row.arrival_s - end_s
    return float("inf")


def timeline(rows: Sequence[Row], limits: Limits, begin_s: float) -> list[tuple[float, float]]:
    """(seconds since `begin_s`, attainment of the requests that arrived in the 5 s up to then), a point each
    second at which there were some."""
    slo = Slo.fixed(limits.ttft_s, limits.tpot_s)
    judged = [(row.arrival_s, outcome_of(row, slo) is Outcome.GOOD) for row in rows]
    found = []
    for second in range(int(_WINDOW_S), int(max((arrival for arrival, _ in judged), default=0.0)) + 1):
        window = [good for arrival, good in judged if second - _WINDOW_S <= arrival < second]
        if window:
            found.append((second - begin_s, sum(window) / len(window)))
    return found
