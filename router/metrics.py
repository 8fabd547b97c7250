"""The router's Prometheus metrics. Labels are few and bounded: never a request id."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from router.placement.base import Kind
from router.pool_view import Role
from router.recovery import Cause
from router.requests import Details, Outcome, Stage
from router.slo import SloClass
from router.token_metrics import TokenMetrics
from router.workload_profile import Trait

_TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_PER_TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_ATTEMPT_BUCKETS = (0, 1, 2, 3, 4, 6, 8, 16)
_RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 4, 10)

_ADMISSIONS = (
    ("accepted", "none"), ("downgraded", "late"), ("rejected", "no_worker"), ("rejected", "no_pair"),
    ("rejected", "gate_full"), ("rejected", "never_fits"), ("rejected", "late"),
    ("rejected", "slo_impossible"),
)  # fmt: skip
_PREDICTED = ("ttft", "tpot", "transfer")


@dataclass(frozen=True, slots=True)
class _OfClass:
    """The histograms of one SLO class, looked up once."""

    ttft: Histogram
    tpot: Histogram
    duration: Histogram


class RouterMetrics:
    """Counts and times requests; every method is one event."""

    def __init__(
        self,
        registry: CollectorRegistry,
        slo_classes: Mapping[str, SloClass],
        gated_requests: Callable[[], int],
        prefix_blocks: Callable[[], int],
        drifting: Callable[[], Collection[Trait]],
    ) -> None:
        """slo_classes: their limits become bucket edges, so that attainment can be read off. gated_requests,
        prefix_blocks: how many wait at the gate, and how many blocks of workers the prefix index knows now.
        drifting: what of the workload is not as it was.
        """
        ttft = _edges(_TTFT_BUCKETS, (limits.ttft_s for limits in slo_classes.values()))
        per_token = _edges(_PER_TOKEN_BUCKETS, (limits.tpot_s for limits in slo_classes.values()))

        def histogram(name: str, meaning: str, label: str, buckets: list[float]) -> Histogram:
            return Histogram(name, meaning, [label], buckets=buckets, registry=registry)

        requests = Counter(
            "prelay_requests_total",
            "Requests that ended, by how. Good: complete, with TTFT and TPOT within the request's limits.",
            ["slo_class", "outcome"],
            registry=registry,
        )
        # All there will be, from the start: a rate needs the zero before the first event, and to look one up
        # by its labels is slow.
        self._requests = {
            (slo_class, outcome): requests.labels(slo_class, outcome)
            for slo_class in slo_classes
            for outcome in Outcome
        }
        ttfts = histogram(
            "prelay_time_to_first_token_seconds", "From arrival to the first token.", "slo_class", ttft
        )
        tpots = histogram(
            "prelay_request_time_per_output_token_seconds",
            "(last token - first token) / (tokens - 1) of each complete answer of more than one token.",
            "slo_class",
            per_token,
        )
        durations = histogram(
            "prelay_request_duration_seconds",
            "From arrival to the end of every request that was let in.",
            "slo_class",
            ttft,
        )
        self._classes = {
            name: _OfClass(ttfts.labels(name), tpots.labels(name), durations.labels(name))
            for name in slo_classes
        }
        limits = Gauge(
            "prelay_slo_limit_seconds",
            "The limits of the configured SLO classes; a request may bring its own.",
            ["slo_class", "limit"],
            registry=registry,
        )
        for name, one in slo_classes.items():
            limits.labels(name, "ttft").set(one.ttft_s)
            limits.labels(name, "tpot").set(one.tpot_s)
        tokens = TokenMetrics(slo_classes, per_token)
        registry.register(tokens)
        self.tokens = tokens.count
        """Called for each delta: see `TokenMetrics`."""
        stages = histogram(
            "prelay_stage_seconds",
            "Where requests' time went; the stages add up to their duration.",
            "stage",
            ttft,
        )
        self._stages = {stage: stages.labels(stage) for stage in Stage}
        admissions = Counter(
            "prelay_admission_total",
            "Requests let in, let in as another SLO class, or refused, and why.",
            ["decision", "reason"],
            registry=registry,
        )
        self._admissions = {labels: admissions.labels(*labels) for labels in _ADMISSIONS}
        self._could_have_served = Counter(
            "prelay_could_have_served_total",
            "Requests refused because they would be late, for which there was room in time after all.",
            registry=registry,
        )
        gated = Gauge("prelay_gated_requests", "Requests that wait for workers.", registry=registry)
        gated.set_function(gated_requests)
        prefix = Gauge(
            "prelay_prefix_index_blocks",
            "Cached blocks of all workers that placement knows of.",
            registry=registry,
        )
        prefix.set_function(prefix_blocks)
        drift = Gauge(
            "prelay_workload_drift",
            "1 while that trait of the workload differs from what it was in the hour before.",
            ["trait"],
            registry=registry,
        )
        for trait in Trait:
            drift.labels(trait).set_function(partial(_is_among, trait, drifting))
        placements = Counter(
            "prelay_placement_total", "Placements on workers, by kind.", ["kind"], registry=registry
        )
        self._placements = {kind: placements.labels(kind) for kind in Kind}
        errors = Histogram(
            "prelay_prediction_error_ratio",
            "Observed over predicted: time to first token, time per output token, exposed transfer.",
            ["what"],
            buckets=_RATIO_BUCKETS,
            registry=registry,
        )
        self._prediction_error = {what: errors.labels(what) for what in _PREDICTED}
        self._recoveries = Counter(
            "prelay_recoveries_total",
            "Placements that were lost and made up for by another one, by what was the matter.",
            ["cause"],
            registry=registry,
        )
        for cause in Cause:
            self._recoveries.labels(cause)
        self._recovered_streams = Counter(
            "prelay_recovered_streams_total",
            "Answers that were complete although they had lost a worker after their first token.",
            registry=registry,
        )
        self._attempts = Histogram(
            "prelay_request_attempts",
            "Placements of every request that was let in; 0 if it never left the gate.",
            buckets=_ATTEMPT_BUCKETS,
            registry=registry,
        )
        self._paused_streams = Counter(
            "prelay_paused_streams_total",
            "Times that a stream was paused because its client did not read.",
            registry=registry,
        )
        self._devices = Gauge(
            "prelay_devices",
            "Devices that the deployment holds: one for each rank of its workers.",
            ["role"],
            registry=registry,
        )
        for role in Role:
            self._devices.labels(role).set(0)
        self._worker_up = Gauge(
            "prelay_worker_up", "1 while the worker is attached and shows signs of life.", ["role", "worker"],
            registry=registry,
        )  # fmt: skip
        self._worker_suspected = Gauge(
            "prelay_worker_suspected",
            "1 while the worker shows no sign of life, but is not given up yet; nothing new goes there.",
            ["role", "worker"],
            registry=registry,
        )
        self._worker_epoch = Gauge(
            "prelay_worker_epoch",
            "Life of the worker that was registered last.",
            ["role", "worker"],
            registry=registry,
        )

    def admission(self, decision: str, reason: str) -> None:
        """A request was let in or refused."""
        self._admissions[decision, reason].inc()

    def rejected(self, slo_class: str) -> None:
        """A request was turned away because of load or missing workers."""
        self._requests[slo_class, Outcome.REJECTED].inc()

    def could_have_served(self, count: int) -> None:
        """So many requests were refused in vain."""
        self._could_have_served.inc(count)

    def predicted(self, what: str, expected_s: float, observed_s: float) -> None:
        """What had been predicted (ttft, tpot, transfer) has come; who predicted nothing is not judged."""
        if expected_s > 0:
            self._prediction_error[what].observe(observed_s / expected_s)

    def placement(self, kind: Kind) -> None:
        """A request was placed on workers."""
        self._placements[kind].inc()

    def finished(self, details: Details, num_tokens: int, *, recovered: bool) -> None:
        """A request that was let in has ended, one way or the other. recovered: after its first token it was
        placed anew."""
        of_class = self._classes[details.slo_class]
        self._requests[details.slo_class, details.outcome].inc()
        of_class.duration.observe(details.duration_s)
        self._attempts.observe(details.attempt)
        for stage, seconds in details.stages.items():
            self._stages[stage].observe(seconds)
        if details.ttft_s is not None:
            of_class.ttft.observe(details.ttft_s)
        if details.outcome.is_complete and num_tokens > 1:
            of_class.tpot.observe(details.tpot_s)
        if details.outcome.is_complete and recovered:
            self._recovered_streams.inc()

    def recovery(self, cause: Cause) -> None:
        """A request that lost its placement gets another one."""
        self._recoveries.labels(cause).inc()

    def paused(self) -> None:
        """A decode worker was told to pause a stream."""
        self._paused_streams.inc()

    def worker(self, role: Role, worker_id: str, epoch: int, *, up: bool) -> None:
        """The state of a registered worker."""
        self._worker_up.labels(role, worker_id).set(up)
        self._worker_epoch.labels(role, worker_id).set(epoch)
        self._worker_suspected.labels(role, worker_id)  # there from the start

    def suspected(self, role: Role, worker_id: str, suspected: bool) -> None:
        """Whether a registered worker is suspected to be dead."""
        self._worker_suspected.labels(role, worker_id).set(suspected)

    def worker_removed(self, role: Role, worker_id: str) -> None:
        """The worker is no longer part of the deployment."""
        self._worker_up.remove(role, worker_id)
        self._worker_epoch.remove(role, worker_id)
        self._worker_suspected.remove(role, worker_id)

    def devices(self, role: Role, count: int) -> None:
        """How many devices the workers of a role hold."""
        self._devices.labels(role).set(count)


def _is_among(trait: Trait, found: Callable[[], Collection[Trait]]) -> bool:
    return trait in found()


def _edges(buckets: Iterable[float], limits: Iterable[float]) -> list[float]:
    return sorted({float(edge) for edge in (*buckets, *limits)})
