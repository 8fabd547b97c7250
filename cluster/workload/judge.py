"""The rule of goodput, applied to rows. Nothing here has seen a server.

A request is good if it is complete, its TTFT is within its limit and its TPOT is, both inclusive. Attainment
is the share of good ones among all that were sent in the window: those that were refused, given up, or failed
stay in the denominator. Goodput is good requests per second of the window. Rows can be judged again by other
limits as often as one likes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from cluster.workload.jobs import Row, Status
from cluster.workload.slo import Slo

_BIN_EDGES = (512, 2048, 8192)
BINS = ("<512", "<2k", "<8k", ">=8k")
"""Prompt lengths, so that goodput is not bought by starving long prompts."""

_NUM_ERRORS = 5
_NUMBER = re.compile(r"\d+(\.\d+)?")


class Outcome(StrEnum):
    """Of one request under its limits."""

    GOOD = "good"
    TTFT_MISS = "ttft_miss"
    TPOT_MISS = "tpot_miss"
    BOTH_MISS = "both_miss"
    REJECTED = "rejected"
    TIMED_OUT = "timed_out"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Seconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles | None:
        """None of nothing."""
        if not len(values):
            return None
        return cls(*(float(value) for value in np.percentile(values, (50, 90, 99))))

    def to_json(self) -> dict[str, float]:
        return {"p50": self.p50, "p90": self.p90, "p99": self.p99}


@dataclass(frozen=True, slots=True)
class BinCount:
    """Requests of one range of prompt lengths."""

    requests: int
    good: int

    @property
    def attainment(self) -> float:
        return self.good / self.requests


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of all requests that were sent in a window of duration_s.

    ttft, itl: of all that got a token (two chunks); tpot: of complete answers of two tokens or more. single:
    complete answers of one token, whose TPOT counts as 0. by_length: of bins that have requests. stages: mean
    seconds of complete answers in each stage, as the server tells. errors: the most frequent messages; those
    that differ in numbers alone are one.
    """

    requests: int
    duration_s: float
    outcomes: Mapping[Outcome, int]
    ttft: Percentiles | None
    tpot: Percentiles | None
    itl: Percentiles | None
    single: int
    output_tokens: int
    by_length: Mapping[str, BinCount]
    stages: Mapping[str, float]
    errors: Mapping[str, int]

    @property
    def good(self) -> int:
        return self.outcomes[Outcome.GOOD]

    @property
    def attainment(self) -> float:
        """0 where nothing was sent: nothing was shown to be good."""
        return self.good / self.requests if self.requests else 0.0

    @property
    def goodput(self) -> float:
        """Good requests per second."""
        return self.good / self.duration_s

    def to_json(self) -> dict[str, Any]:
        """Seconds; None where there is nothing to say."""
        return {
            "requests": self.requests,
            "duration_s": self.duration_s,
            "offered": self.requests / self.duration_s,
            "outcomes": {outcome.value: self.outcomes[outcome] for outcome in Outcome},
            "attainment": self.attainment,
            "goodput": self.goodput,
            "reject_rate": self.outcomes[Outcome.REJECTED] / self.requests if self.requests else 0.0,
            "ttft_s": self.ttft.to_json() if self.ttft else None,
            "tpot_s": self.tpot.to_json() if self.tpot else None,
            "itl_s": self.itl.to_json() if self.itl else None,
            "single_token_answers": self.single,
            "output_tokens_s": self.output_tokens / self.duration_s,
            "by_length": {
                name: {"requests": found.requests, "good": found.good, "attainment": found.attainment}
                for name, found in self.by_length.items()
            },
            "stages_s": dict(self.stages),
            "errors": dict(self.errors),
        }


def outcome_of(row: Row, slo: Slo) -> Outcome:
    """What a request is under its limits."""
    if row.status is not Status.COMPLETE:
        return Outcome(row.status.value)
    limits = slo.limits(row.prompt_tokens)
    assert row.ttft_s is not None
    assert row.tpot_s is not None
    match (row.ttft_s <= limits.ttft_s, row.tpot_s <= limits.tpot_s):
        case (True, True):
            return Outcome.GOOD
        case (False, True):
            return Outcome.TTFT_MISS
        case (True, False):
            return Outcome.TPOT_MISS
        case _:
            return Outcome.BOTH_MISS


def length_bin(prompt_tokens: int) -> str:
    """One of BINS."""
    return BINS[sum(prompt_tokens >= edge for edge in _BIN_EDGES)]


def judge(rows: Sequence[Row], slo: Slo, duration_s: float) -> Judgement:
    """rows: of all requests that were due in a window of duration_s, or in several that take as long
    together."""
    outcomes = [outcome_of(row, slo) for row in rows]
    complete = [row for row in rows if row.status is Status.COMPLETE]
    return Judgement(
        requests=len(rows),
        duration_s=duration_s,
        outcomes=Counter(outcomes),
        ttft=Percentiles.of([row.ttft_s for row in rows if row.ttft_s is not None]),
        tpot=Percentiles.of(
            [row.tpot_s for row in complete if row.output_tokens > 1 and row.tpot_s is not None]
        ),
        itl=Percentiles.of([gap_s for row in rows for gap_s in row.gaps_s]),
        single=sum(row.output_tokens == 1 for row in complete),
        output_tokens=sum(row.output_tokens for row in complete),
        by_length=_by_length(rows, outcomes),
        stages=_mean_stages(complete),
        errors=_errors(rows),
    )


def _by_length(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> dict[str, BinCount]:
    requests, good = Counter[str](), Counter[str]()
    for row, outcome in zip(rows, outcomes, strict=True):
        name = length_bin(row.prompt_tokens)
        requests[name] += 1
        good[name] += outcome is Outcome.GOOD
    return {name: BinCount(requests[name], good[name]) for name in BINS if requests[name]}


def _mean_stages(rows: Sequence[Row]) -> dict[str, float]:
    told = [row.stages for row in rows if row.stages]
    names = dict.fromkeys(name for stages in told for name in stages)
    return {name: sum(stages.get(name, 0.0) for stages in told) / len(told) for name in names}


def _errors(rows: Sequence[Row]) -> dict[str, int]:
    alike: dict[str, str] = {}
    counts = Counter[str]()
    for row in rows:
        if row.error:
            counts[alike.setdefault(_NUMBER.sub("#", row.error), row.error)] += 1
    return dict(counts.most_common(_NUM_ERRORS))
