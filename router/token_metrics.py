"""Tokens and the gaps between them, for Prometheus.

There are tens of thousands a second, and a counter or histogram of the client library takes a lock for each.
So they are counted in plain numbers here, from one thread, and become metrics when somebody asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import INF, floatToGoString


@dataclass(slots=True)
class _Gaps:
    """Of one SLO class. counts: by bucket, not summed up; the last one has no upper edge."""

    counts: list[int]
    sum_s: float = 0.0


class TokenMetrics(Collector):
    """edges: upper ones of the buckets of gaps, seconds, ascending."""

    def __init__(self, slo_classes: Collection[str], edges: Sequence[float]) -> None:
        self._edges = list(edges)
        self._gaps = {name: _Gaps([0] * (len(self._edges) + 1)) for name in slo_classes}
        self._num_tokens = 0

    def count(self, slo_class: str, now: float, previous: float | None, count: int) -> None:
        """`count` tokens of one answer came at `now`; the one before them at `previous`, if there was one."""
        self._num_tokens += count
        gaps = self._gaps[slo_class]
        if previous is None:
            gaps.counts[0] += count - 1
            return
        gaps.sum_s += now - previous
        gaps.counts[bisect_left(self._edges, (now - previous) / count)] += count

    def describe(self) -> Iterator[Metric]:
        """So that nothing else is registered by these names."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """As the client library asks for it."""
        yield CounterMetricFamily("prelay_tokens", "Tokens of answers.", value=self._num_tokens)
        family = HistogramMetricFamily(
            "prelay_inter_token_latency_seconds",
            "Between consecutive tokens of one answer.",
            labels=["slo_class"],
        )
        names = [*map(floatToGoString, [*self._edges, INF])]
        for slo_class, gaps in self._gaps.items():
            buckets = [*zip(names, map(float, accumulate(gaps.counts)), strict=True)]
            family.add_metric([slo_class], buckets, gaps.sum_s)
        yield family
