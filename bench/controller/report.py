"""What became of each phase under each who decided on roles, and how that compares with the oracle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.controller.phases import Shift
from cluster.role_decider import Shape
from cluster.workload.errors import BadInputError
from cluster.workload.jobs import Row
from cluster.workload.judge import Outcome, outcome_of
from cluster.workload.slo import Limits, Slo

CONTROLLER = "controller"
_BIN_S = 30.0

Best = tuple[Shape, float]
"""The oracle's shape for a phase, and good requests/s with it."""


@dataclass(frozen=True, slots=True)
class Ran:
    """One that decided on roles. rows: of each seed, by arrival since the first phase began. details: what
    else is to be told of it."""

    name: str
    begins_with: Shape
    rows: Sequence[Sequence[Row]]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Judge:
    """Of rows of a shift, by the same limits for all."""

    shift: Shift
    limits: Limits

    @property
    def slo(self) -> Slo:
        return Slo.fixed(self.limits.ttft_s, self.limits.tpot_s)

    def goods(self, rows: Sequence[Row]) -> list[float]:
        """Good requests/s by phase."""
        begins_s = self.shift.begins_s
        found = [0] * len(begins_s)
        for row in rows:
            number = max(0, sum(begin_s <= row.arrival_s for begin_s in begins_s) - 1)
            found[number] += outcome_of(row, self.slo) is Outcome.GOOD
        return [count / phase.seconds for count, phase in zip(found, self.shift.phases, strict=True)]

    def whole(self, goods: Sequence[float]) -> float:
        """Good requests/s over all phases."""
        phases = self.shift.phases
        total = sum(good * phase.seconds for good, phase in zip(goods, phases, strict=True))
        return total / self.shift.seconds

    def timeline(self, rows: Sequence[Row]) -> list[tuple[float, float]]:
        """(seconds, good requests/s of those that arrived in the half-minute from then on, or in what is left
        of the last phase)."""
        counts = [0] * math.ceil(self.shift.seconds / _BIN_S)
        for row in rows:
            place = min(int(row.arrival_s / _BIN_S), len(counts) - 1)
            counts[place] += outcome_of(row, self.slo) is Outcome.GOOD
        begins_s = [number * _BIN_S for number in range(len(counts))]
        widths_s = [min(_BIN_S, self.shift.seconds - begin_s) for begin_s in begins_s]
        return [(at_s, count / width) for at_s, count, width in zip(begins_s, counts, widths_s, strict=True)]


def check_possible(best: Sequence[Best], num_workers: int) -> None:
    """Raises BadInputError if there is nothing to compare with."""
    if not any(good for _, good in best):
        raise BadInputError(
            f"not one request is good on {num_workers} workers, whatever their roles; give limits that can "
            "be kept, lower rates, or more workers"
        )


def report(judge: Judge, devices: int, best: Sequence[Best], runs: Sequence[Ran]) -> dict[str, Any]:
    """As JSON. best: of each phase. runs: the controller first."""
    oracle = [good for _, good in best]

    def result(ran: Ran) -> dict[str, Any]:
        by_seed = [judge.goods(one) for one in ran.rows]
        goods = [sum(some) / len(some) for some in zip(*by_seed, strict=True)]
        return {
            "name": ran.name,
            "begins_with": str(ran.begins_with),
            "goodput": goods,
            "of_oracle": [good / most if most else 0.0 for good, most in zip(goods, oracle, strict=True)],
            "of_oracle_whole": judge.whole(goods) / judge.whole(oracle),
            "of_oracle_by_seed": [judge.whole(one) / judge.whole(oracle) for one in by_seed],
            "timeline": judge.timeline(ran.rows[0]),
            **ran.details,
        }

    return {
        "devices": devices,
        "slo": {"ttft_s": judge.limits.ttft_s, "tpot_s": judge.limits.tpot_s},
        "seeds": len(runs[0].rows),
        "phases": [
            {
                "workload": phase.source.name,
                "rate": phase.rate,
                "seconds": phase.seconds,
                "oracle": {"shape": str(shape), "goodput": good},
            }
            for phase, (shape, good) in zip(judge.shift.phases, best, strict=True)
        ],
        "deployments": [result(ran) for ran in runs],
    }


def shapes_of(num_workers: int) -> list[Shape]:
    """All that can serve."""
    every = [
        Shape(prefill, decode, num_workers - prefill - decode)
        for prefill in range(num_workers + 1)
        for decode in range(num_workers + 1 - prefill)
    ]
    return [shape for shape in every if shape.can_serve]
