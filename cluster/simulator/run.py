"""A workload through a simulated cluster: a row for each request, as a load generator would write it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from cluster.simulator.clock import Clock
from cluster.simulator.cluster_spec import ClusterSpec, Fault, WorkerSpec
from cluster.simulator.errors import SimulationError
from cluster.simulator.network import Network
from cluster.simulator.reader import Reader
from cluster.simulator.reshaping import Reshaper, Reshaping
from cluster.simulator.router import Router
from cluster.simulator.row_table import RowTable
from cluster.simulator.worker import KnownLatency, Worker
from cluster.simulator.writer import Writer
from cluster.workload.drawing import Arrival
from cluster.workload.jobs import Row, Status
from cluster.workload.prompts import PromptWriter
from cluster.workload.slo import Slo
from engine.sequence import TokenSampling
from router.policies import POLICIES
from router.pool_view import Role, WorkerView
from router.requests import Request
from router.slo import Slo as RouterSlo
from router.slo import SloLimits
from router.workload_profile import Seen, WorkloadProfile

MAX_RUN = 64
"""Decode steps that are one event at most: longer runs are usually cut."""

_VOCABULARY = range(1000, 30_000)


@dataclass(frozen=True, slots=True)
class Outcome:
    """rows: in the order of arrival. placements: by kind. refused_in_vain: requests that were refused for
    being late although there was room for them in time after all. preemptions: of sequences, for blocks.
    ended_s: when the last answer was complete."""

    rows: Sequence[Row]
    placements: dict[str, int]
    refused_in_vain: int
    preemptions: int
    ended_s: float

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Outcome:
        """By rules that know nothing but requests."""
        return cls(rows, {}, 0, 0, max((row.arrival_s + (row.last_s or 0.0) for row in rows), default=0.0))


def simulate(
    cluster: ClusterSpec,
    arrivals: Sequence[Arrival],
    slo: Slo,
    seed: int = 0,
    max_run: int = MAX_RUN,
    goes_on: Callable[[int, Row], bool] | None = None,
    reshaping: Reshaping | None = None,
) -> Outcome:
    """slo: what requests come with. max_run: 1 takes decode steps one by one, with the same result. goes_on:
    told of each request that has ended, with its number; False ends the simulation, and those that have not
    ended then are timed out. reshaping: who changes workers' roles meanwhile.

    Raises SimulationError.
    """
    return _Simulation(cluster, arrivals, slo, seed, max_run, goes_on).run(reshaping)


class _Simulation:
    def __init__(
        self,
        cluster: ClusterSpec,
        arrivals: Sequence[Arrival],
        slo: Slo,
        seed: int,
        max_run: int,
        goes_on: Callable[[int, Row], bool] | None,
    ) -> None:
        _check(cluster)
        self._cluster = cluster
        self._arrivals = arrivals
        self._slo = slo
        self._max_run = max_run
        self._clock = Clock()
        self._network = Network(cluster.network)
        self._shares = any(one.shape.hash_ids for one in arrivals)
        self._prompts = PromptWriter((seed,), _VOCABULARY)
        self._tokens = (0,) * max((one.shape.prompt_tokens for one in arrivals), default=0)
        self._rows = RowTable(arrivals)
        self._goes_on = goes_on
        self._router = Router(cluster, self._clock, seed, self._ended)
        self._workers: dict[str, Worker] = {}
        self._workload = WorkloadProfile(0.0)
        self._num_ended = 0
        self._ended_s = 0.0
        self._num_lives = 0
        self._num_preemptions = 0

    def run(self, reshaping: Reshaping | None) -> Outcome:
        clock = self._clock
        for spec in self._cluster.workers:
            self._start(spec)
        for fault in self._cluster.faults:
            self._plan(fault)
        self._arrive_from(0)
        if reshaping is not None:
            Reshaper(reshaping, self, clock).begin()
        clock.run()
        for worker in self._workers.values():
            self._retire(worker)
        router = self._router
        return Outcome(
            self._rows,
            dict(router.placements),
            router.num_refused_in_vain,
            self._num_preemptions,
            self._ended_s,
        )

    def _ended(self, number: int, row: Row) -> None:
        self._rows.put(number, row)
        self._num_ended += 1
        if row.status is Status.COMPLETE:
            self._workload.ended(self._clock.now, row.prompt_tokens, row.output_tokens, 0)
        self._ended_s = max(self._ended_s, row.arrival_s + (row.last_s or 0.0))
        if self._goes_on is not None and not self._goes_on(number, row):
            self._clock.stop()

    def _arrive_from(self, number: int) -> None:
        """One after the other, so that few wait on the clock."""
        if number == len(self._arrivals):
            return
        arrival = self._arrivals[number]

        def arrive() -> None:
            self._arrive_from(number + 1)
            self._workload.arrived(arrival.arrival_s)
            self._router.arrive(number, self._request(number, arrival))

        self._clock.at(arrival.arrival_s, arrive)

    def _request(self, number: int, arrival: Arrival) -> Request:
        shape, limits = arrival.shape, self._slo.limits(arrival.shape.prompt_tokens)
        prompt = tuple(self._prompts.prompt(shape)) if self._shares else self._tokens[: shape.prompt_tokens]
        return Request(
            request_id=str(number),
            prompt_token_ids=prompt,
            sampling=_sampling(shape.output_tokens),
            stop=(),
            slo=RouterSlo("default", SloLimits(limits.ttft_s, limits.tpot_s)),
            tenant="",
            arrived_at=arrival.arrival_s,
            deadline=arrival.arrival_s + self._cluster.timeout_s,
        )

    def _start(self, spec: WorkerSpec) -> None:
        """A new life of that worker."""
        self._num_lives += 1
        life = (spec, self._cluster, self._clock, self._router, self._num_lives, self._shares)
        if spec.role is Role.PREFILL:
            reader = Reader(*life, self._network)
            self._workers[spec.worker_id] = reader
            self._router.reader_up(reader, self._view(reader))
        else:
            writer = Writer(*life, self._max_run)
            self._workers[spec.worker_id] = writer
            self._router.writer_up(writer, self._view(writer))

    def _view(self, worker: Worker) -> WorkerView:
        spec = worker.spec
        view = WorkerView(spec.worker_id, self._num_lives, spec.role, worker.capacity, spec.latency)
        if not self._cluster.noise:
            view.latency = KnownLatency(spec.latency)
        return view

    def _plan(self, fault: Fault) -> None:
        def come_back() -> None:
            self.come_back(self._workers[fault.worker_id].spec)

        self._clock.at(fault.at_s, lambda: self.leave(fault.worker_id))
        self._clock.at(fault.at_s + max(fault.down_s, 2 * self._cluster.network.message_s), come_back)

    # What of it can be changed.

    @property
    def roles(self) -> Mapping[str, Role]:
        return {worker_id: worker.spec.role for worker_id, worker in self._workers.items()}

    @property
    def seen(self) -> Seen:
        return self._workload.seen(self._clock.now)

    @property
    def is_over(self) -> bool:
        return self._num_ended == len(self._arrivals)

    def change_role(self, spec: WorkerSpec) -> None:
        worker = self._workers[spec.worker_id]
        worker.spec = replace(worker.spec, role=spec.role)
        self._router.change_role(spec.worker_id, spec.role)

    def drain(self, worker_id: str) -> int:
        return self._router.drain(worker_id)

    def leave(self, worker_id: str) -> None:
        worker = self._workers[worker_id]
        worker.die()
        self._retire(worker)
        self._router.after_message(lambda: self._router.worker_down(worker_id))

    def come_back(self, spec: WorkerSpec) -> None:
        self._start(spec)

    def _retire(self, worker: Worker) -> None:
        if isinstance(worker, Writer):
            self._num_preemptions += worker.num_preemptions
            worker.num_preemptions = 0


def _sampling(output_tokens: int) -> TokenSampling:
    """As a load generator asks for an answer of exactly that length."""
    return TokenSampling(
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        seed=0,
        max_tokens=output_tokens,
        min_tokens=0,
        stop_token_ids=frozenset(),
    )


def _check(cluster: ClusterSpec) -> None:
    """Raises SimulationError."""
    if cluster.policy not in POLICIES:
        raise SimulationError(
            f"policy {cluster.policy!r}: there are {', '.join(sorted(POLICIES))}; give one of these"
        )
    numbers = (
        cluster.noise, cluster.timeout_s, cluster.network.bytes_per_s, cluster.network.message_s,
    )  # fmt: skip
    if not all(math.isfinite(number) for number in numbers):
        raise SimulationError("noise, time-out, bandwidth and the time of a message must be finite numbers")
    roles = {worker.role for worker in cluster.workers}
    if Role.MIXED not in roles and not {Role.PREFILL, Role.DECODE} <= roles:
        raise SimulationError(
            f"workers of the roles {', '.join(sorted(roles)) or 'none'}: there must be a prefill and a "
            "decode worker, or a mixed one"
        )
    ids = [worker.worker_id for worker in cluster.workers]
    if len(set(ids)) != len(ids):
        raise SimulationError("two workers have the same id: give each its own")
    for worker in cluster.workers:
        if worker.role.writes and worker.max_batch_tokens < worker.max_num_seqs:
            raise SimulationError(
                f"worker {worker.worker_id}: {worker.max_batch_tokens} tokens a step are less than one for "
                f"each of {worker.max_num_seqs} sequences; raise --max-batch-tokens or lower --max-num-seqs"
            )
        if not worker.latency.is_known:
            raise SimulationError(f"worker {worker.worker_id}: it is not known how long its steps take")
    if unknown := sorted({fault.worker_id for fault in cluster.faults} - set(ids)):
        raise SimulationError(f"a fault of {unknown[0]}, which is no worker; there are {', '.join(ids)}")
    for one, after in pairwise(sorted(cluster.faults, key=lambda fault: (fault.worker_id, fault.at_s))):
        if one.worker_id == after.worker_id and after.at_s <= one.at_s + one.down_s:
            raise SimulationError(
                f"{one.worker_id} dies at {after.at_s:g} s while it is down from {one.at_s:g} s on for "
                f"{one.down_s:g} s; let it come back first"
            )
