"""A prefill worker in virtual time: production's scheduler, blocks and prefix cache; steps that only last.

What a step computes is offered to the writer in the parts in which the real worker offers it, booked with the
network when the step is over; what the reader holds for a hand-off is free when the writer has all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.simulator.clock import Clock
from cluster.simulator.cluster_spec import ClusterSpec, WorkerSpec
from cluster.simulator.live import Placed, SimulatedWriter
from cluster.simulator.network import Network
from cluster.simulator.router import Router
from cluster.simulator.worker import Worker
from engine.block_pool import Holder
from engine.latency import StepShape
from engine.sequence import ChunkResult, RequestKey
from prefill_worker.loop import LAYER_GROUPS, MIN_GROUPED_TOKENS
from prefill_worker.prompts import ComputedPart, Prefilled
from prefill_worker.scheduler import PrefillScheduler
from router.pool_view import Load
from router.prefix_index import cache_salt

_NO_TOKEN, _TOKEN = ChunkResult(None), ChunkResult(0)


@dataclass(slots=True)
class _Handoff:
    """fetched_at: when all that was offered so far is with the writer."""

    placed: Placed
    writer: SimulatedWriter
    fetched_at: float = 0.0


class Reader(Worker):
    """Commands: `read`, `cancel`."""

    def __init__(
        self,
        spec: WorkerSpec,
        cluster: ClusterSpec,
        clock: Clock,
        router: Router,
        index: int,
        shares: bool,
        network: Network,
    ) -> None:
        super().__init__(spec, cluster, clock, router, index, shares)
        self._network = network
        self._latency = self.machine.online()
        self._scheduler = PrefillScheduler(self.pool, self.cache, spec.max_batch_tokens, self._latency)
        self._reading: dict[RequestKey, _Handoff] = {}
        # Blocks of prompts that are read, until their writers have them.
        self._leased: dict[RequestKey, tuple[int, ...]] = {}

    def read(self, placed: Placed, writer: SimulatedWriter) -> None:
        request = placed.request
        self._reading[placed.key] = _Handoff(placed, writer)
        self._scheduler.add(
            placed.key,
            request.prompt_token_ids + request.answered,
            len(request.answered),
            request.sampling,
            cache_salt(request),
            placed.urgency,
            self.clock.now,
        )

    def cancel(self, key: RequestKey) -> None:
        self._scheduler.cancel(key)
        self._reading.pop(key, None)
        self._free(key)

    def load(self) -> Load:
        scheduler = self._scheduler
        return Load(
            self._commands_seen,
            scheduler.num_running + scheduler.num_waiting,
            scheduler.queue_tokens,
            self.pool.num_available,
        )

    def _begin(self) -> bool:
        now = self.clock.now
        chunks = self._scheduler.schedule(now)
        for part in self._scheduler.take_found():
            self._offer(part, now, now, 1)
        if not chunks:
            return False
        shape = StepShape(tuple((len(chunk.token_ids), chunk.start) for chunk in chunks))
        seconds = self.machine.step_s(shape)
        results = [_NO_TOKEN if chunk.sampling is None else _TOKEN for chunk in chunks]
        self.clock.at(now + seconds, lambda: self._end(shape, seconds, results, now))
        return True

    def _interrupt(self) -> None:
        """A step is a step."""

    def _end(self, shape: StepShape, seconds: float, results: list[ChunkResult], began: float) -> None:
        if not self.is_up:
            return
        now = self.clock.now
        self._latency.observe(shape, seconds)
        groups = LAYER_GROUPS if shape.num_tokens >= MIN_GROUPED_TOKENS else 1
        for part in self._scheduler.parts():
            self._offer(part, began, now, groups)
        ended = False
        for done in self._scheduler.complete(results, now):
            ended = self._read(done) or ended
        if ended:
            self.push()
        self._step_over(shape, seconds)

    def _offer(self, part: ComputedPart, began: float, ended: float, groups: int) -> None:
        """Offered in equal groups of layers, one after the other as they are computed."""
        handoff = self._reading.get(part.key)
        if handoff is None:
            return
        tokens = part.end_token - max(part.start_token, handoff.placed.cached_tokens)
        for group in range(groups if tokens > 0 else 0):
            at = began + (ended - began) * (group + 1) / groups
            handoff.fetched_at = self._network.send(
                self.worker_id, handoff.writer.worker_id, tokens * self.spec.kv_bytes // groups, at
            )

    def _read(self, done: Prefilled) -> bool:
        """The first token is out. Returns whether it is the last, too."""
        now = self.clock.now
        handoff = self._reading.pop(done.key)
        live, writer, is_last = handoff.placed.live, handoff.writer, done.stop_reason is not None
        times = (done.prefill_queue_s, done.prefill_s)
        self.router.after_message(lambda: self.router.first_token(live, done.key, times, is_last=is_last))
        if is_last:
            self.pool.drop(done.blocks, Holder.SEQUENCE)
            return True
        self._leased[done.key] = done.blocks
        self.pool.add(done.blocks, Holder.TRANSFER)
        self.pool.drop(done.blocks, Holder.SEQUENCE)
        ready = max(handoff.fetched_at, now + self._message_s)

        def deliver() -> None:
            writer.deliver(done.key, ready - now, ready)

        self.clock.at(ready, lambda: writer.tell(deliver))
        self.clock.at(ready + self._message_s, lambda: self.tell(lambda: self._free(done.key)))
        return False

    def _free(self, key: RequestKey) -> None:
        """The writer has it, or nobody wants it."""
        blocks = self._leased.pop(key, None)
        if blocks is not None:
            self.pool.drop(blocks, Holder.TRANSFER)
