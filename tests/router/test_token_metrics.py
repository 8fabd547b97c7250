"""Tokens that are counted in plain numbers are exported as the client library would have counted them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.openmetrics.exposition import generate_latest

from router.token_metrics import TokenMetrics

EDGES = [0.125, 0.25, 0.5, 4.0]
GAPS = st.sampled_from([0.0, 0.0625, 0.125, 0.25, 0.375, 4.0, 5.0])
"""Halves of halves, of which floats make no other number."""


@given(
    deltas=st.lists(
        st.tuples(st.sampled_from(["default", "batch"]), st.one_of(st.none(), GAPS), st.integers(1, 3))
    )
)
def test_like_a_counter_and_a_histogram(deltas):
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    metrics = TokenMetrics(["default", "batch"], EDGES)
    ours.register(metrics)
    counter = Counter("prelay_tokens_total", "Tokens of answers.", registry=theirs)
    histogram = Histogram(
        "prelay_inter_token_latency_seconds",
        "Between consecutive tokens of one answer.",
        ["slo_class"],
        buckets=EDGES,
        registry=theirs,
    )
    for slo_class in ("default", "batch"):
        histogram.labels(slo_class)
    for slo_class, gap_s, count in deltas:
        metrics.count(slo_class, 8.0, None if gap_s is None else 8.0 - gap_s * count, count)
        counter.inc(count)
        for _ in range(count - 1 if gap_s is None else count):
            histogram.labels(slo_class).observe(gap_s or 0.0)
    assert lines(ours) == lines(theirs)


def lines(registry):
    """Without the times at which things were created."""
    found = {}
    for line in generate_latest(registry).decode().splitlines():
        name, _, value = line.rpartition(" ")
        if "_created" not in name:
            found[name] = value
    return found
