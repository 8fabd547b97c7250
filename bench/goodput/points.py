"""One run at one rate, as it is kept: every judged request in a few numbers, and what the router counted.

Of a policy that does not look at limits, a point can be judged again by any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.workload.jobs import Row, Status
from cluster.workload.judge import Judgement, judge
from cluster.workload.slo import Limits, Slo

_DIGITS = 5


@dataclass(frozen=True, slots=True)
class Setting:
    """What a point is one of: a workload, and a variant of a deployment, which its name and the values tried
    name."""

    workload: str
    deployment: str
    setting: str


@dataclass(frozen=True, slots=True)
class Point:
    """place: on the grid of rates. limits: of the workload while it ran. rows: judged, without gaps and
    stages, arrivals counting from the beginning of what is judged. said: what was to be said of it then (the
    judgement's figures, the router's counters, the client's use of the CPU)."""

    of: Setting
    round: int
    place: int
    rate: float
    limits: Limits
    duration_s: float
    rows: Sequence[Row]
    said: Mapping[str, Any]

    def judged(self, limits: Limits) -> Judgement:
        """By these limits; ITL and stages are not kept for that."""
        return judge(self.rows, Slo.fixed(limits.ttft_s, limits.tpot_s), self.duration_s)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "point",
            "workload": self.of.workload,
            "deployment": self.of.deployment,
            "setting": self.of.setting,
            "round": self.round,
            "place": self.place,
            "rate": self.rate,
            "limits": [self.limits.ttft_s, self.limits.tpot_s],
            "duration_s": self.duration_s,
            "rows": rows_to_json(self.rows),
            "said": self.said,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Point:
        """What to_json gave; KeyError, TypeError or ValueError for anything else."""
        return cls(
            Setting(raw["workload"], raw["deployment"], raw["setting"]),
            raw["round"],
            raw["place"],
            raw["rate"],
            Limits(*raw["limits"]),
            raw["duration_s"],
            rows_from_json(raw["rows"]),
            raw["said"],
        )


def rows_to_json(rows: Sequence[Row]) -> list[list[Any]]:
    """[arrival, prompt tokens, output tokens, status, first token, last token] each, seconds."""
    return [
        [
            round(row.arrival_s, _DIGITS),
            row.prompt_tokens,
            row.output_tokens,
            row.status.value,
            None if row.first_s is None else round(row.first_s, _DIGITS),
            None if row.last_s is None else round(row.last_s, _DIGITS),
        ]
        for row in rows
    ]


def rows_from_json(raw: Sequence[Sequence[Any]]) -> list[Row]:
    """What rows_to_json gave."""
    return [
        Row(arrival_s, arrival_s, prompt, output, Status(status), first_s, last_s)
        for arrival_s, prompt, output, status, first_s, last_s in raw
    ]
