"""What an operator sees of the hand-offs of one worker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from transfer.handoff import HandoffFailure

_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


State = TypeVar("State", bound=Enum)


class LeaseMetrics:
    """Of both sides: hand-offs that are open, and leases that ended by themselves."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._leases = Gauge("prelay_leases", "Hand-offs in each state.", ["state"], registry=registry)
        self._expirations = Counter(
            "prelay_lease_expirations_total",
            "Leases that ended without news from the peer.",
            registry=registry,
        )

    def hold(self, counts: Mapping[State, int]) -> None:
        """counts: hand-offs by state of their state machine."""
        for state, count in counts.items():
            self._leases.labels(state.value).set(count)

    def expired(self) -> None:
        self._expirations.inc()


class PullMetrics:
    """Of the decode side: what was copied, how long it took, what failed.

    backends: those that may be used; their figures are there from the start, as zeros.
    """

    def __init__(self, registry: CollectorRegistry, backends: Iterable[str]) -> None:
        self._bytes = Counter(
            "prelay_transfer_bytes_total", "KV bytes copied from peers.", ["backend"], registry=registry
        )
        self._copy = Histogram(
            "prelay_transfer_seconds",
            "Time to copy one offer's KV.",
            ["backend"],
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self._exposed = Histogram(
            "prelay_transfer_exposed_seconds",
            "Time from the end of a prompt's prefill to the end of its KV's last copy.",
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self._failures = Counter(
            "prelay_transfer_failures_total", "Hand-offs that failed.", ["reason"], registry=registry
        )
        self._digests = Counter(
            "prelay_transfer_digests_total",
            "Offers whose copy was checked against digests, by outcome.",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("good", "bad"):
            self._digests.labels(outcome)
        for backend in backends:
            self._bytes.labels(backend)
            self._copy.labels(backend)
        for reason in HandoffFailure:
            self._failures.labels(reason.value)

    def checked(self, *, is_good: bool) -> None:
        """A part came with digests."""
        self._digests.labels("good" if is_good else "bad").inc()

    def copied(self, backend: str, num_bytes: int, copy_s: float) -> None:
        self._bytes.labels(backend).inc(num_bytes)
        self._copy.labels(backend).observe(copy_s)

    def delivered(self, exposed_s: float) -> None:
        self._exposed.observe(exposed_s)

    def failed(self, reason: HandoffFailure) -> None:
        self._failures.labels(reason.value).inc()
