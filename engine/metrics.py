"""What an operator sees of one worker's engine, by the same names for both roles.

Which worker it is, Prometheus knows from the target that it scrapes: the router lists them with their role.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from engine.latency import StepShape
from engine.router_messages import Load

_STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BATCH_BUCKETS = tuple(float(2**i) for i in range(15))


class WorkerMetrics:
    """phase: what most steps of this worker compute, prefill or decode."""

    def __init__(self, registry: CollectorRegistry, phase: str) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, registry=registry)

        self._queue_requests = gauge("prelay_queue_requests", "Requests accepted but not yet in the batch.")
        self._queue_tokens = gauge("prelay_queue_tokens", "Prompt tokens not yet computed.")
        self._running = gauge("prelay_running_requests", "Requests in the running batch.")
        blocks = Gauge("prelay_kv_blocks", "KV blocks by state.", ["state"], registry=registry)
        self._blocks = {state: blocks.labels(state) for state in ("free", "owned", "leased", "cached")}
        self._hits = Counter(
            "prelay_prefix_cache_hit_tokens_total",
            "Tokens whose KV was in the prefix cache.",
            registry=registry,
        )
        self._preemptions = Counter(
            "prelay_preemptions_total",
            "Times that a sequence gave its KV blocks to an older one.",
            registry=registry,
        )
        self._step = Histogram(
            "prelay_step_seconds",
            "Time of one engine step: prefill holds prompt chunks only, decode none, mixed both.",
            ["phase"],
            buckets=_STEP_BUCKETS_S,
            registry=registry,
        )
        self._step.labels(phase)
        self._batch = Histogram(
            "prelay_batch_tokens",
            "Tokens computed by one engine step.",
            buckets=_BATCH_BUCKETS,
            registry=registry,
        )

    def show(self, load: Load) -> None:
        self._queue_requests.set(load.queue_requests)
        self._queue_tokens.set(load.queue_tokens)
        self._running.set(load.running_requests)
        self._blocks["free"].set(load.free_blocks - load.cached_blocks)
        self._blocks["cached"].set(load.cached_blocks)
        self._blocks["owned"].set(load.owned_blocks)
        self._blocks["leased"].set(load.leased_blocks)

    def hit(self, num_tokens: int) -> None:
        """So many tokens need not be computed."""
        self._hits.inc(num_tokens)

    def preempted(self, count: int) -> None:
        self._preemptions.inc(count)

    def stepped(self, shape: StepShape, step_s: float) -> None:
        self._step.labels(shape.phase).observe(step_s)
        self._batch.observe(shape.num_tokens)
