"""A small pool in virtual time: real policy, real pool view, workers that are queues with a latency model.

Of a worker that is modelled on which placement depends: it takes commands between steps; a step holds all
who decode and chunks of prompts, whose order and size the workers' own cores choose; it lasts as long as the
latency model says, give or take `noise`. Messages take MESSAGE_S each way. Not modelled: blocks, failures,
prefix caches.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from decode_worker.chunk_budget import ChunkBudget, Pace
from engine.latency import LatencyModel, OnlineLatency, StepShape
from engine.sequence import RequestKey
from engine.urgency import Urgency, rank
from prefill_worker.chunk_size import ChunkSizes, Waiting
from router.admission.base import Refusal
from router.estimates import Estimates
from router.lengths import OutputLengths
from router.pair_table import LinkState, Pair, PairLink
from router.placement.base import Decision, Kind
from router.policies import POLICIES, PolicyInputs
from router.pool_view import Load, PoolView, Role, WorkerCapacity, WorkerView
from router.prefix_index import PrefixIndex
from router.requests import Request

MESSAGE_S = 0.001
SPELL_S = 3.0
SLOWER = 1.4
BEAT_S = 0.2
RETRY_S = 0.01


@dataclass
class Job:
    """A request and what came of it. num_tokens: of its answer, which nobody is told before."""

    request: Request
    num_tokens: int
    attempt: int = 0
    decision: Decision | None = None
    refused: bool = False
    emitted: int = 0
    first_at: float | None = None
    last_at: float | None = None
    unread: int = 0

    @property
    def key(self) -> RequestKey:
        return RequestKey(self.request.request_id, self.attempt)

    @property
    def num_read(self) -> int:
        return self.request.num_tokens - self.unread

    @property
    def urgency(self) -> Urgency:
        slo = self.request.slo
        return Urgency(self.request.arrived_at + slo.limits.ttft_s, slo.limits.tpot_s, slo.priority)

    def pace(self, now: float) -> Pace:
        assert self.first_at is not None
        most_left = self.request.sampling.max_tokens - self.emitted
        tpot_s = self.request.slo.limits.tpot_s
        return Pace(tpot_s, now - self.first_at, self.emitted - 1, most_left, _context(self))

    @property
    def ttft_s(self) -> float:
        return float("inf") if self.first_at is None else self.first_at - self.request.arrived_at

    @property
    def tpot_s(self) -> float:
        if self.first_at is None or self.last_at is None or self.emitted < self.num_tokens:
            return float("inf")
        return (self.last_at - self.first_at) / max(1, self.num_tokens - 1)

    @property
    def is_good(self) -> bool:
        limits = self.request.slo.limits
        return self.ttft_s <= limits.ttft_s and self.tpot_s <= limits.tpot_s


@dataclass
class Machine:
    """What workers are made of. transfer_s: of a token's KV, what is not hidden behind its prefill."""

    model: LatencyModel
    max_batch_tokens: int = 512
    max_num_seqs: int = 64
    num_blocks: int = 100_000
    transfer_s: float = 1e-5
    noise: float = 0.05
    slow_spells: float = 0.0  # share of the time in which steps take SLOWER times as long


class ModelWorker:
    """One worker of any role, told how urgent requests are or not."""

    def __init__(self, pools: Pools, view: WorkerView, machine: Machine, is_told: bool) -> None:
        self.pools, self.view, self.machine, self.is_told = pools, view, machine, is_told
        self.prompts: list[Job] = []
        self.writing: list[Job] = []
        self.num_reserved = 0  # hand-offs on the way
        self.inbox: list[Callable[[], None]] = []
        self.commands_seen = 0
        self.is_busy = False
        self._latency = OnlineLatency(machine.model)
        self._sizes = ChunkSizes(self._latency, machine.max_batch_tokens)
        self._budget = ChunkBudget(self._latency, machine.max_batch_tokens)

    def tell(self, what: Callable[[], None]) -> None:
        """A command: taken between steps."""
        self.inbox.append(what)
        if not self.is_busy:
            self._step()

    def read(self, job: Job) -> None:
        job.unread = job.request.num_tokens
        self.prompts.append(job)

    def reserve(self, job: Job) -> None:
        self.num_reserved += 1

    def write(self, job: Job) -> None:
        self.num_reserved -= 1
        self.writing.append(job)

    def snapshot(self) -> None:
        tightest = self._tightest()
        self.view.snapshot(
            Load(
                commands_seen=self.commands_seen,
                requests=len(self.prompts) + self.num_reserved + len(self.writing),
                queue_tokens=sum(job.unread for job in self.prompts),
                free_blocks=self.machine.num_blocks,
                decoding_requests=len(self.writing),
                decode_context=sum(_context(job) for job in self.writing),
                least_tpot_s=0.0 if tightest is None else tightest.sustained_s,
                ahead_s=0.0 if tightest is None else max(0.0, tightest.ahead_s),
            ),
            self.pools.now,
        )

    def _tightest(self) -> Pace | None:
        if not self.is_told:
            return None
        return self._budget.tightest(job.pace(self.pools.now) for job in self.writing)

    def _chunks(self) -> list[tuple[Job, int]]:
        prompts = self._in_order()
        in_whole = False
        left = self.machine.max_batch_tokens - len(self.writing)
        first_left = left
        if self.is_told and prompts and self.view.role is Role.MIXED:
            tightest = self._tightest()
            context = sum(_context(job) for job in self.writing)
            wanted = [(job.unread, job.num_read) for job in prompts]
            left = first_left = self._budget.num_tokens(
                len(self.writing), context, None if tightest is None else tightest.effective_s, wanted
            )
        elif self.is_told and prompts:
            size = self._sizes.step(
                self._waiting(prompts[0]), [self._waiting(one) for one in prompts[1:]], self.pools.now
            )
            first_left, left = size.first, max(size.first, size.together)
            in_whole = True
        chunks = []
        for job in prompts:
            new = min(left, job.unread) if chunks else min(first_left, job.unread)
            if new <= 0 or (chunks and in_whole and new < job.unread):
                break
            left -= new
            chunks.append((job, new))
        return chunks

    def _waiting(self, job: Job) -> Waiting:
        return Waiting(job.urgency, job.unread, job.num_read, self._needs_s(job))

    def _needs_s(self, job: Job) -> float:
        return self.machine.model.prefill_s(job.unread, job.num_read)

    def _in_order(self) -> list[Job]:
        if not self.is_told:
            return self.prompts
        now = self.pools.now
        return sorted(
            self.prompts,
            key=lambda job: rank(job.urgency, job.request.arrived_at, self._needs_s(job), now),
        )

    def _step(self) -> None:
        for command in self.inbox:
            command()
        self.inbox.clear()
        chunks = self._chunks()
        self.is_busy = bool(chunks or self.writing)
        if not self.is_busy:
            return
        shape = StepShape(
            prefill=tuple((new, job.num_read) for job, new in chunks),
            decode_batch=len(self.writing),
            decode_context=sum(_context(job) for job in self.writing),
        )
        noise = self.pools.rng.uniform(1.0 - self.machine.noise, 1.0 + self.machine.noise)
        seconds = noise * self._slowness() * self.machine.model.step_s(shape)
        writing = list(self.writing)
        self.pools.at(self.pools.now + seconds, lambda: self._end_step(shape, seconds, chunks, writing))

    def _slowness(self) -> float:
        """A machine that others use, too: some seconds of it are slow, the same ones for all policies."""
        spell = int(self.pools.now / SPELL_S)
        chance = random.Random(f"{self.pools.seed}/{self.view.worker_id}/{spell}").random()
        return SLOWER if chance < self.machine.slow_spells else 1.0

    def _end_step(
        self, shape: StepShape, seconds: float, chunks: list[tuple[Job, int]], writing: list[Job]
    ) -> None:
        self._latency.observe(shape, seconds)
        self.view.observe(shape, seconds)
        for job in writing:
            if self.pools.token(self, job):
                self.writing.remove(job)
        for job, new in chunks:
            job.unread -= new
            if job.unread == 0:
                self.prompts.remove(job)
                if self.pools.token(self, job):
                    continue
                if self.view.role is Role.MIXED:
                    self.writing.append(job)
                else:
                    self.pools.hand_off(self, job)
        self._step()


@dataclass
class Pools:
    """The router's shell and its workers, by id."""

    machines: dict[str, tuple[Role, Machine]]
    policy_name: str
    seed: int
    now: float = 0.0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self._numbers = count()
        self._commands: dict[str, int] = {}
        self.pool = PoolView()
        for worker_id, (role, machine) in self.machines.items():
            capacity = WorkerCapacity(16, machine.num_blocks, machine.max_num_seqs, machine.max_batch_tokens)
            self.pool.add(WorkerView(worker_id, 1, role, capacity, machine.model))
        for prefill in self.pool.up(Role.PREFILL):
            for writer in (*self.pool.up(Role.DECODE), *self.pool.up(Role.MIXED)):
                pair = Pair(prefill.worker_id, writer.worker_id)
                self.pool.pairs.put(pair, PairLink(LinkState.LINKED))
        prefixes, self.lengths = PrefixIndex(self.pool), OutputLengths()
        self.estimates = Estimates(self.pool, prefixes, self.lengths)
        inputs = PolicyInputs(self.pool, prefixes, self.estimates, random.Random(self.seed + 1), 10_000, 1.0)
        self.policy = POLICIES[self.policy_name](inputs)
        self.workers = {
            worker_id: ModelWorker(self, self.pool[worker_id], machine, self.policy.tells_urgency)
            for worker_id, (_, machine) in self.machines.items()
        }
        self.jobs: dict[str, Job] = {}
        self.in_vain = 0
        self._retries = False
        self._left = 0
        self.kinds: dict[Kind, int] = dict.fromkeys(Kind, 0)

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what))

    def run(self, jobs: Sequence[Job], until: float) -> None:
        """All of them arrive when they say; ends with the last answer, or at `until`."""
        for job in jobs:
            self.jobs[job.request.request_id] = job
            self.at(job.request.arrived_at, lambda job=job: self._arrive(job))
        self.at(BEAT_S, self._beat)
        self._left = len(jobs)
        while self._events and self._left:
            self.now, _, what = heapq.heappop(self._events)
            if self.now > until:
                return
            what()

    def _beat(self) -> None:
        for worker in self.workers.values():
            worker.snapshot()
        self._pump()
        self.at(self.now + BEAT_S, self._beat)

    def _arrive(self, job: Job) -> None:
        verdict = self.policy.admission.judge(job.request, self.now, 0, overdue=False)
        if isinstance(verdict, Refusal):
            job.refused = True
            self._left -= 1
            return
        self.policy.gate.add(verdict)
        self._pump()

    def _pump(self) -> None:
        while self._place_next():
            pass
        self.in_vain += self.policy.admission.could_have_served(self.now)
        if len(self.policy.gate) and not self._retries:
            self._retries = True
            self.at(self.now + RETRY_S, self._retry)

    def _retry(self) -> None:
        self._retries = False
        self._pump()

    def _place_next(self) -> bool:
        for request in self.policy.gate.next(self.now):
            decision = self.policy.placement.choose(request, (), self.now)
            if decision is not None:
                self._place(self.jobs[request.request_id], decision)
                return True
        return False

    def _place(self, job: Job, decision: Decision) -> None:
        self.policy.gate.placed(job.request.request_id)
        job.attempt += 1
        job.decision = decision
        self.kinds[decision.kind] += 1
        self.estimates.credit(job.key, job.request, decision, self.now)
        writer = self.workers[decision.decode]
        if decision.prefill is None:
            self._send(writer, job, lambda: writer.read(job))
            return
        reader = self.workers[decision.prefill]
        # Reserve, Reserved, Prefill: the decode worker answers between steps.

        def reserve() -> None:
            writer.reserve(job)
            self.at(self.now + MESSAGE_S, lambda: self._send(reader, job, lambda: reader.read(job)))

        self._send(writer, job, reserve)

    def _send(self, worker: ModelWorker, job: Job, what: Callable[[], None]) -> None:
        number = self._commands[worker.view.worker_id] = self._commands.get(worker.view.worker_id, 0) + 1
        worker.view.sent(job.key, number)

        def heard() -> None:
            worker.commands_seen = number
            what()

        self.at(self.now + MESSAGE_S, lambda: worker.tell(heard))

    def hand_off(self, reader: ModelWorker, job: Job) -> None:
        """Its first token is out; the tail of its KV travels."""
        assert job.decision is not None
        writer = self.workers[job.decision.decode]
        seconds = MESSAGE_S + reader.machine.transfer_s * job.request.num_tokens
        pair = Pair(reader.view.worker_id, writer.view.worker_id)
        self.estimates.transfers.observe(pair, job.request.num_tokens, seconds)
        self.at(self.now + seconds, lambda: writer.tell(lambda: writer.write(job)))

    def token(self, worker: ModelWorker, job: Job) -> bool:
        """A token of the answer; returns whether it was the last."""
        assert job.decision is not None
        job.emitted += 1
        job.last_at = self.now
        if job.first_at is None:
            job.first_at = self.now
        is_done = job.emitted == job.num_tokens
        self.at(self.now + MESSAGE_S, lambda: self._heard_token(worker, job, is_done))
        return is_done

    def _heard_token(self, worker: ModelWorker, job: Job, is_done: bool) -> None:
        assert job.decision is not None
        writer = self.workers[job.decision.decode].view
        if worker.view is not writer:
            worker.view.release(job.key)
        writer.emitted(job.key, 1)
        if is_done:
            if worker.view is not writer:
                self.workers[job.decision.decode].num_reserved -= 1
            writer.release(job.key)
            self.lengths.observe(job.request, job.num_tokens)
            self._left -= 1
        if is_done or worker.view is not writer or job.emitted == 1:
            self._pump()


def _context(job: Job) -> int:
    return job.request.num_tokens + job.emitted
