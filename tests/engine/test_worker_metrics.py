"""What an operator sees of a worker's steps."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from engine.latency import StepShape
from engine.metrics import WorkerMetrics


@pytest.mark.parametrize(
    ("shape", "phase"),
    [
        (StepShape(((5, 0), (3, 16))), "prefill"),
        (StepShape((), 3, 40), "decode"),
        (StepShape(((5, 0),), 3, 40), "mixed"),
    ],
)
def test_a_step_is_counted_under_what_it_computed(shape: StepShape, phase: str) -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry, "prefill")
    assert registry.get_sample_value("prelay_step_seconds_count", {"phase": "prefill"}) == 0
    metrics.stepped(shape, 0.25)
    assert registry.get_sample_value("prelay_step_seconds_sum", {"phase": phase}) == 0.25
    assert registry.get_sample_value("prelay_batch_tokens_sum") == shape.num_tokens
