"""What a plan is asked for: a workload, its limits, the hardware, and what counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from cluster.planner.goodput import Patience
from cluster.planner.hardware import Hardware
from cluster.planner.kinds import Kind
from cluster.planner.plans import Objective, Plan
from cluster.simulator.cluster_spec import NetworkSpec, WorkerSpec
from cluster.simulator.distserve import (
    Pool,
    simulate_decode,
    simulate_distserve,
    simulate_distserve_colocated,
    simulate_prefill,
)
from cluster.simulator.run import simulate
from cluster.workload.datasets import Dataset, Lengths, Mix, Shape, Synthetic, TimedRows
from cluster.workload.drawing import Arrival, WorkloadSpec, arrivals
from cluster.workload.jobs import Row
from cluster.workload.judge import Outcome, outcome_of
from cluster.workload.slo import Slo
from engine.latency import LatencyModel, StepShape
from router.pool_view import Role

T = TypeVar("T")

_SAMPLE = 2000
_MOST_COUNT = 4000
_ANSWERS = 4.0
"""A trial lasts so many times as long as an answer may take: a batch is full only after the first."""
_WAITS = 10.0
"""And so many times as long as a first token may take: queues that grow slowly are late only then."""
SETTLE_S = 60.0
"""That a trial lasts at least, in virtual time."""
_NO_TRANSFER = NetworkSpec(bytes_per_s=1e18, part_s=0.0)
WARM_UP, COOL_DOWN = 0.25, 0.15
"""Of the requests, those that come first and last are not judged: a cluster is emptier then."""


@dataclass(frozen=True, slots=True)
class ModelTimes:
    """A worker's latency model, as the single phases are simulated with. capacity: prompt tokens of a
    batch."""

    latency: LatencyModel
    capacity: int
    pp: int = 1

    def prefill_s(self, lengths: Sequence[int], *, is_first: bool) -> float:
        return self.latency.step_s(StepShape(tuple((length, 0) for length in lengths)))

    def decode_s(self, batch: int, context: int, *, is_first: bool) -> float:
        return self.latency.decode_s(batch, context + batch)


@dataclass(frozen=True)
class Question:
    """workload: what comes; its rate is what is searched. slo: limits in seconds. target: share of requests
    that have to be good. count: requests of a trial at least; more at high rates. seeds: of a trial's
    arrivals. by_distserve: the rules of DistServe's simulator decide, not the joint simulation. settle_s:
    that a trial lasts at least, in virtual time. has_transfer, has_memory: False leaves out, in the joint
    simulation, that hand-offs take time and that workers hold only so much. prompt_scale: of the workload's
    prompts, for what-if questions; link_scale: of the bandwidth of hand-offs. is_owned: the devices are there
    anyway, so what a plan serves is held against all of them."""

    workload: WorkloadSpec
    slo: Slo
    hardware: Hardware
    target: float = 0.9
    objective: Objective = Objective.DEVICE
    count: int = 400
    seeds: tuple[int, ...] = (0, 1)
    by_distserve: bool = False
    settle_s: float = SETTLE_S
    has_transfer: bool = True
    has_memory: bool = True
    prompt_scale: float = 1.0
    link_scale: float = 1.0
    is_owned: bool = False

    def cost(self, plan: Plan) -> float:
        """What goodput is divided by. Raises PlanError if it is not known."""
        return float(self.hardware.count) if self.is_owned else plan.cost(self.objective)

    @cached_property
    def sample(self) -> Sequence[Arrival]:
        """Of the workload, whatever its rate."""
        return self._scaled(arrivals(self.workload, 0, 1.0, count=_SAMPLE))

    @cached_property
    def _shapes(self) -> Sequence[Shape]:
        """All that may come, if they can be counted."""
        known = [self._scaled_shape(shape) for shape in _most(self.workload.dataset)]
        return known or [one.shape for one in self.sample]

    @cached_property
    def longest(self) -> int:
        """Tokens of prompt and answer together."""
        return max(shape.prompt_tokens + shape.output_tokens for shape in self._shapes)

    @cached_property
    def longest_prompt(self) -> int:
        return max(shape.prompt_tokens for shape in self._shapes)

    @cached_property
    def mean_prompt(self) -> float:
        return sum(one.shape.prompt_tokens for one in self.sample) / len(self.sample)

    @cached_property
    def _answer_s(self) -> float:
        """That the mean answer may take."""
        mean = sum(one.shape.output_tokens for one in self.sample) / len(self.sample)
        return mean * self.slo.limits(round(self.mean_prompt)).tpot_s

    @property
    def _period_s(self) -> float:
        dataset = self.workload.dataset
        return dataset.period_s if isinstance(dataset, Mix) else 0.0

    @property
    def at_a_glance(self) -> Question:
        """The same with half as much to simulate, and one seed."""
        return replace(self, count=self.count // 2, settle_s=self.settle_s / 2, seeds=self.seeds[:1])

    def prefill_alone(self, kind: Kind, rate: float, seed: int) -> tuple[int, int]:
        """A trial of one worker that only reads: how many have their first token in time."""
        rows = simulate_prefill(self._arrivals(rate, seed), Pool(self._times(kind)))
        limits = [self.slo.limits(row.prompt_tokens).ttft_s for row in rows]
        good = [(row.ttft_s or 0.0) <= limit for row, limit in zip(rows, limits, strict=True)]
        return sum(_judged(good)), len(_judged(good))

    def decode_alone(self, kind: Kind, rate: float, seed: int) -> tuple[int, int]:
        """A trial of one worker that only writes: how many keep their time per token."""
        most = self._most_context(kind)
        rows = simulate_decode(self._arrivals(rate, seed), Pool(self._times(kind), most_context=most))
        limits = [self.slo.limits(row.prompt_tokens).tpot_s for row in rows]
        good = [(row.tpot_s or 0.0) <= limit for row, limit in zip(rows, limits, strict=True)]
        return sum(_judged(good)), len(_judged(good))

    def joint(self, plan: Plan, rate: float, seed: int) -> tuple[int, int]:
        """A trial of a whole plan: both limits, with memory, transfer and the router's policy. Given up when
        it is clear that there are too few good ones; those that had not ended then do not count as good."""
        outcomes = self.outcomes(plan, rate, seed)
        return outcomes[Outcome.GOOD], outcomes.total()

    def outcomes(self, plan: Plan, rate: float, seed: int) -> Counter[Outcome]:
        """The same trial: what became of how many."""
        return Counter(outcome_of(row, self.slo) for row in self.rows(plan, rate, seed))

    def rows(self, plan: Plan, rate: float, seed: int) -> Sequence[Row]:
        """The same trial: the requests that are judged."""
        requests = self._arrivals(rate, seed)
        if self.by_distserve:
            return _judged(self._by_distserve(plan, requests))
        return _judged(self._simulated(plan, requests, seed))

    def _simulated(self, plan: Plan, requests: Sequence[Arrival], seed: int) -> Sequence[Row]:
        patience = Patience(self.slo, self.target, len(_judged(range(len(requests)))))
        cluster = plan.cluster(self.link_bytes_per_s(plan))
        if not self.has_transfer:
            cluster = replace(cluster, network=_NO_TRANSFER)
        if not self.has_memory:
            cluster = replace(cluster, workers=[self._endless(worker) for worker in cluster.workers])
        return simulate(cluster, requests, self.slo, seed, goes_on=patience.goes_on).rows

    def link_bytes_per_s(self, plan: Plan) -> float:
        """Of a device to its peers of the other phase."""
        within = min(pool.kind.gpu.link_bytes_per_s for pool in plan.pools)
        one_gpu = len({pool.kind.gpu for pool in plan.pools}) == 1  # of two kinds none shares a node
        if not one_gpu or (not plan.is_near and self.hardware.count > self.hardware.per_node):
            within = min(within, self.hardware.inter_bytes_per_s)
        return within * self.link_scale

    def prompt_at(self, share: float) -> int:
        """Tokens of the prompt that is longer than such a share of all."""
        prompts = sorted(one.shape.prompt_tokens for one in self.sample)
        return prompts[min(len(prompts) - 1, int(share * len(prompts)))]

    def idle(self, kind: Kind, prompt: int | None = None) -> tuple[float, float]:
        """TTFT and TPOT of a request alone on such workers. prompt: its tokens; of the workload's usual
        request if None."""
        prompt = max(1, round(self.mean_prompt)) if prompt is None else prompt
        return (
            self._times(kind).prefill_s([prompt], is_first=True),
            self._times(kind).decode_s(1, prompt, is_first=True),
        )

    def _arrivals(self, rate: float, seed: int) -> list[Arrival]:
        """So many that queues have time to build up, batches to fill, and a mix to come round."""
        lasts_s = max(self.settle_s, _WAITS * self.slo.limits(round(self.mean_prompt)).ttft_s)
        least_s = max(_ANSWERS * self._answer_s, self._period_s)
        count = max(self.count, min(_MOST_COUNT, round(lasts_s * rate)), round(least_s * rate))
        return self._scaled(arrivals(self.workload, seed, rate, count=count))

    def _scaled(self, requests: list[Arrival]) -> list[Arrival]:
        if self.prompt_scale == 1.0:
            return requests
        return [replace(one, shape=self._scaled_shape(one.shape)) for one in requests]

    def _scaled_shape(self, shape: Shape) -> Shape:
        scale = self.prompt_scale
        tokens = max(1, round(shape.prompt_tokens * scale))
        return replace(shape, prompt_tokens=tokens, block_tokens=shape.block_tokens * scale)

    def _endless(self, worker: WorkerSpec) -> WorkerSpec:
        """With room for as many sequences as it takes, however long."""
        most = (worker.max_num_seqs + 1) * (self.longest + worker.block_size)
        return replace(worker, kv_tokens=max(worker.kv_tokens, most))

    def _times(self, kind: Kind) -> ModelTimes:
        return ModelTimes(kind.latency, max(2048, self.longest_prompt))

    def _most_context(self, kind: Kind) -> int:
        return max(kind.kv_tokens, self.longest)

    def _by_distserve(self, plan: Plan, requests: Sequence[Arrival]) -> Sequence[Row]:
        pools = {pool.role: pool for pool in plan.pools}
        both = pools.get(Role.MIXED)
        if both is not None:
            return simulate_distserve_colocated(requests, _distserve_pool(both.kind, both.replicas))
        reader, writer = pools[Role.PREFILL], pools[Role.DECODE]
        prefill, decode = (_distserve_pool(pool.kind, pool.replicas) for pool in (reader, writer))
        return simulate_distserve(requests, prefill, decode)


def _most(dataset: Dataset) -> Sequence[Shape]:
    """All shapes of it, or those of the greatest lengths; none if it does not say."""
    match dataset:
        case Lengths() | TimedRows():
            return dataset.pool
        case Synthetic():
            return [Shape(dataset.prompt[1], dataset.answer[1])]
        case Mix():
            return [*_most(dataset.first), *_most(dataset.second)]
    return []


def _judged(values: Sequence[T]) -> Sequence[T]:
    return values[math.ceil(WARM_UP * len(values)) : math.floor((1 - COOL_DOWN) * len(values))]


def _distserve_pool(kind: Kind, replicas: int) -> Pool:
    assert kind.times is not None, "only measured kinds follow DistServe's rules"
    return Pool(kind.times, replicas)
