"""The limits of a workload: one pair for all its requests.

Multiples are of what one request of the workload takes alone: the one whose prompt is as long as the 90th
percentile, so that the limits leave long prompts a chance. It is measured on a prefill and a decode worker
and on one mixed worker, and for each of TTFT and TPOT the faster of the two counts: neither way of serving
gets limits that its own slowness has made loose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.load.idle import check_possible
from cluster.workload.jobs import Job
from cluster.workload.slo import IdlePoint, IdleTimes, Limits, Slo

QUANTILE = 0.9
_QUANTILES = (0.1, 0.5, QUANTILE)
_MAX_ANSWER = 32
SAMPLE = 400
"""Requests that a workload's lengths are taken from."""


@dataclass(frozen=True, slots=True)
class Typical:
    """Of a workload. lengths: prompts at the 10th, 50th and 90th percentile. answer: median tokens, or as
    many as are enough to time one."""

    lengths: tuple[int, ...]
    answer: int

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> Typical:
        prompts = np.quantile([len(job.prompt_token_ids) for job in jobs], _QUANTILES, method="nearest")
        answer = np.quantile([job.output_tokens for job in jobs], 0.5, method="nearest")
        return cls(tuple(int(length) for length in prompts), max(2, min(_MAX_ANSWER, int(answer))))


@dataclass(frozen=True, slots=True)
class Idle:
    """What requests of a workload take alone, by the way in which they are served."""

    typical: Typical
    by_reference: Mapping[str, IdleTimes]

    def best(self, prompt_tokens: int) -> Limits:
        """The faster of the ways, for each of the two times."""
        found = [times.at(prompt_tokens) for times in self.by_reference.values()]
        return Limits(min(one.ttft_s for one in found), min(one.tpot_s for one in found))

    @property
    def median(self) -> Limits:
        """Of a request with a prompt of median length."""
        return self.best(self.typical.lengths[1])

    def limits(self, slo: Slo) -> Limits:
        """Raises MeasurementError for seconds that not even a request alone can keep."""
        length = self.typical.lengths[-1]
        alone = self.best(length)
        check_possible(slo, IdleTimes([IdlePoint(length, alone.ttft_s, alone.tpot_s)]))
        return Limits(slo.ttft.seconds(alone.ttft_s), slo.tpot.seconds(alone.tpot_s))
