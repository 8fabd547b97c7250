"""A deployment under a workload, and its twin in the simulator: same workers, policy, limits and arrivals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bench.accuracy.correction import Correction, Spent, correct
from bench.goodput.experiment import MeasurePart
from bench.goodput.points import Point, Setting
from bench.goodput.sources import Source
from bench.goodput.variants import Variant
from bench.goodput.visit import spec_of, window_s
from bench.simulate.kv import kv_bytes
from cluster.config import ServeConfig
from cluster.planner.goodput import Patience, highest_rate
from cluster.sections import PrefillSection, WritingSection
from cluster.simulator.cluster_spec import ClusterSpec, NetworkSpec, WorkerSpec
from cluster.simulator.run import simulate
from cluster.workload.drawing import Arrival, arrivals
from cluster.workload.errors import BadInputError
from cluster.workload.jobs import Row
from cluster.workload.judge import judge
from cluster.workload.slo import Limits, Slo
from engine.config import ModelConfig
from engine.latency import LatencyModel
from router.pool_view import Role

_TARGET = 0.9
_SEARCHED = 300
"""Requests of a trial when the highest rate is searched in the simulator."""
_IDS = range(100, 200)
_HOPS_APART, _HOPS_MIXED = 4, 2


@dataclass(frozen=True)
class Case:
    """limits: of all requests. profile: of a worker alone."""

    source: Source
    variant: Variant
    limits: Limits
    measure: MeasurePart
    profile: LatencyModel

    @property
    def setting(self) -> Setting:
        return Setting(self.source.name, self.variant.deployment, self.variant.setting)

    @property
    def slo(self) -> Slo:
        return Slo.fixed(self.limits.ttft_s, self.limits.tpot_s)

    def simulated(self, rate: float, seed: int, correction: Correction) -> list[Row]:
        """What `bench.goodput.visit.run_at` measures, simulated: the requests that are judged."""
        warmup_s = self.measure.warmup_s
        requests = arrivals(
            spec_of(self.source, _IDS), seed, rate, duration_s=warmup_s + window_s(self.measure, rate)
        )
        cluster = twin_of(self.variant.config, self.profile, correction, self._timeout_s(requests))
        rows = simulate(cluster, requests, self.slo, seed).rows
        return [replace(row, arrival_s=row.arrival_s - warmup_s) for row in rows if row.arrival_s >= warmup_s]

    def corrected(self, point: Point) -> Correction:
        """So that the twin spends as long as the deployment did at that point."""
        real = Spent.of(point.rows, point.said["stages_s"])
        if real is None:
            return Correction()
        are_apart = not self.variant.config.mixed.replicas

        def twin(correction: Correction) -> Spent | None:
            rows = self.simulated(point.rate, seed_of(point.round), correction)
            return Spent.of(rows, judge(rows, self.slo, point.duration_s).stages)

        return correct(real, twin, _HOPS_APART if are_apart else _HOPS_MIXED, are_apart=are_apart)

    def saturation(self, correction: Correction) -> float | None:
        """The highest rate at which nine tenths are good, in the simulator; None if there is none."""
        slo, spec = self.slo, spec_of(self.source, _IDS)

        def trial(rate: float, seed: int) -> tuple[int, int]:
            requests = arrivals(spec, seed, rate, count=_SEARCHED)
            cluster = twin_of(self.variant.config, self.profile, correction, self._timeout_s(requests))
            patience = Patience(slo, _TARGET, len(requests))
            rows = simulate(cluster, requests, slo, seed, goes_on=patience.goes_on).rows
            found = judge(rows, slo, 1.0)
            return found.good, found.requests

        start = 0.5 * self.variant.readers / self.limits.ttft_s
        found = highest_rate(trial, _TARGET, start, (0,))
        return None if found.is_none else found.rate

    def _timeout_s(self, requests: Sequence[Arrival]) -> float:
        """As a client that is measured: none that might still be good is given up."""
        longest = max((one.shape.output_tokens for one in requests), default=0)
        return max(self.measure.timeout_s, self.limits.ttft_s + self.limits.tpot_s * longest)


def seed_of(number: int) -> int:
    """Of a round; that of the run which is not judged has a number below 0."""
    return number if number >= 0 else 1000 - number


def twin_of(
    config: ServeConfig, profile: LatencyModel, correction: Correction, timeout_s: float
) -> ClusterSpec:
    """The simulated cluster of a configuration. Raises BadInputError if it leaves open how much a worker
    holds."""
    router = config.router
    return ClusterSpec(
        list(_workers(config, profile, correction)),
        router.policy,
        NetworkSpec(message_s=correction.message_s),
        max_gated_requests=router.max_gated_requests,
        retry_after_s=router.retry_after_s,
        max_attempts=router.max_attempts,
        timeout_s=timeout_s,
    )


def _workers(config: ServeConfig, profile: LatencyModel, correction: Correction) -> Iterator[WorkerSpec]:
    assert config.model.path is not None
    kv = kv_bytes(ModelConfig.from_pretrained(config.model.path), config.model.dtype)
    for role in Role:
        pool = config.pools[role.value]
        if not pool.replicas:
            continue
        if pool.kv_cache_tokens is None:
            raise BadInputError(
                f"{role.value}.kv_cache_tokens is not given, so nobody knows what a simulated worker holds; "
                "give it in `common` of the experiment"
            )
        assert isinstance(pool, PrefillSection | WritingSection)
        factor = correction.reading if role is Role.PREFILL else correction.writing
        spec = WorkerSpec(
            "", role, profile.times(factor), pool.kv_cache_tokens, kv, pool.num_ranks * pool.threads,
            block_size=config.kv.block_size, max_batch_tokens=pool.max_batch_tokens,
            max_num_seqs=pool.max_num_seqs if isinstance(pool, WritingSection) else 1,
        )  # fmt: skip
        for index in range(pool.replicas):
            yield replace(spec, worker_id=f"{role.value}-{index}")
