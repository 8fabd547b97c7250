"""A decode or mixed worker in virtual time: production's scheduler, block pool and prefix cache; steps that
only last.

Most steps are like the one before: the same sequences, a token longer. So a run of such steps is one event
(`steps.py`), at whose end what they did is done at once; whatever comes in the middle of it cuts it at the
end of the step under way. With max_run 1 each step is an event, which is what runs are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.simulator.clock import Clock
from cluster.simulator.cluster_spec import ClusterSpec, WorkerSpec
from cluster.simulator.live import Live, Placed
from cluster.simulator.router import Router, Token
from cluster.simulator.steps import Run
from cluster.simulator.worker import Worker
from decode_worker.scheduler import DecodeScheduler
from decode_worker.sequences import Decoded, DecodeTask
from engine.block_pool import Holder
from engine.latency import StepShape
from engine.reservation import has_room, reserved_blocks
from engine.sequence import ChunkResult, RequestKey, ScheduledChunk
from router.pool_view import Load
from router.prefix_index import cache_salt

_NO_TOKEN, _TOKEN = ChunkResult(None), ChunkResult(0)


@dataclass(slots=True)
class _Request:
    """leased: blocks for what travels; empty if it is read here, or is with the scheduler."""

    live: Live
    task: DecodeTask
    leased: list[int]


class Writer(Worker):
    """Commands: `reserve`, `cancel`. max_run: most steps of a run."""

    def __init__(
        self,
        spec: WorkerSpec,
        cluster: ClusterSpec,
        clock: Clock,
        router: Router,
        index: int,
        shares: bool,
        max_run: int,
    ) -> None:
        super().__init__(spec, cluster, clock, router, index, shares)
        latency = self.machine.online()
        self._scheduler = DecodeScheduler(
            self.pool, self.cache, spec.max_num_seqs, spec.max_batch_tokens, latency
        )
        self._requests: dict[RequestKey, _Request] = {}
        # What is cut of a run has drawn its noise in vain: then the next steps would have others.
        self._max_run = 1 if cluster.noise else max_run
        self._run: Run | None = None
        self._began = 0.0
        self.num_preemptions = 0

    def reserve(self, placed: Placed, *, is_local: bool) -> None:
        live, key, request = placed.live, placed.key, placed.request
        tokens = request.prompt_token_ids + request.answered
        salt = cache_salt(request)
        digests = self.cache.digests(tokens, salt)
        task = DecodeTask(key, tokens, len(request.answered), request.sampling, salt, placed.urgency, digests)
        size = self.spec.block_size
        cached = self.cache.match(task.usable_digests(size) if is_local else digests)
        holder = Holder.SEQUENCE if is_local else Holder.TRANSFER
        num_new = reserved_blocks(size, len(tokens), request.tokens_left) - len(cached)
        self.pool.add(cached, holder)
        free, num_here = self.pool.num_available, len(self._requests)
        if self._scheduler.lacks_blocks or not has_room(num_new, free, num_here):
            self.pool.drop(cached, holder)
            self.router.after_message(lambda: self.router.no_room(live, key))
            self.push()
            return
        blocks = cached + self.pool.allocate(num_new, holder)
        cached_tokens = len(cached) * size
        self._requests[key] = _Request(live, task, [] if is_local else blocks)
        if is_local:
            self._scheduler.read(task, blocks, cached_tokens, self.clock.now)
        else:
            self.router.after_message(lambda: self.router.reserved(live, key, cached_tokens))

    def deliver(self, key: RequestKey, transfer_s: float, ready: float) -> None:
        request = self._requests.get(key)
        if request is None:
            return
        blocks, request.leased = request.leased, []
        request.task.transfer_s = transfer_s
        self.pool.add(blocks, Holder.SEQUENCE)
        self.pool.drop(blocks, Holder.TRANSFER)
        self._scheduler.add(request.task, 0, blocks, ready)

    def cancel(self, key: RequestKey) -> None:
        request = self._requests.pop(key, None)
        if request is not None and not self._scheduler.cancel(key):
            self.pool.drop(request.leased, Holder.TRANSFER)

    def load(self) -> Load:
        if self._run is not None:
            self._apply(self._run.num_over(self.clock.now))
        scheduler = self._scheduler
        decoding, context = scheduler.decoding
        least_tpot_s = scheduler.least_tpot_s
        return Load(
            self._commands_seen,
            len(self._requests),
            scheduler.queue_tokens,
            self.pool.num_available,
            decoding_requests=decoding,
            decode_context=context,
            least_tpot_s=(least_tpot_s or 0.0) if decoding else 0.0,
            ahead_s=scheduler.ahead_s if decoding else 0.0,
        )

    def _begin(self) -> bool:
        now = self._began = self.clock.now
        is_something = self._scheduler.plan(now)
        num_preemptions, _ = self._scheduler.take_counts()
        self.num_preemptions += num_preemptions
        if not is_something:
            return False
        shape = self._scheduler.shape
        if shape.prefill or self._max_run == 1:
            chunks = self._scheduler.chunks()
            self.clock.at(now + self.machine.step_s(shape), lambda: self._end(shape, chunks))
            return True
        count = self._scheduler.num_alike(self._max_run)
        steps_s = self.machine.decode_run_s(shape.decode_batch, shape.decode_context, count)
        keys = self._scheduler.batch_keys
        run = self._run = Run(now, steps_s, [(self._requests[key].live, key) for key in keys])
        self.router.runs(self.worker_id, run)
        self.clock.at(run.end, lambda: self._end_run(run, run.num_steps))
        return True

    def _interrupt(self) -> None:
        run = self._run
        if run is not None and run.cut(self.clock.now):
            self.clock.at(run.end, lambda: self._end_run(run, run.num_steps))

    def _end(self, shape: StepShape, chunks: list[ScheduledChunk]) -> None:
        """Of a step by itself."""
        if not self.is_up:
            return
        results = [_NO_TOKEN if chunk.sampling is None else _TOKEN for chunk in chunks]
        self._tell(self._scheduler.complete(results, self._began, self.clock.now), shape, is_run=False)

    def _end_run(self, run: Run, num_steps: int) -> None:
        if not self.is_up or run is not self._run or num_steps != run.num_steps:
            return  # it was cut
        self._apply(num_steps - 1)
        shape, self._run = self._scheduler.shape, None
        steps = [(self._began, self.clock.now)]
        self._tell(self._scheduler.coast(steps, is_last=True), shape, is_run=True)

    def _apply(self, num_steps: int) -> None:
        """So many steps of the run are over, and at least one is not."""
        run = self._run
        assert run is not None
        steps = run.take(num_steps)
        if steps:
            self._began = steps[-1][1]
            self._num_steps += len(steps)
            self._scheduler.coast(steps, is_last=False)

    def _tell(self, decoded: list[Decoded], shape: StepShape, *, is_run: bool) -> None:
        """is_run: the router counts the tokens itself, and is told only what is special."""
        tokens = [self._token(one) for one in decoded]
        ended = any(token.is_last for token in tokens)
        if tokens:
            self.router.after_message(lambda: self.router.tokens(self.worker_id, tokens, are_counted=is_run))
        if ended:
            self.push()
        self._step_over(shape, self.clock.now - self._began)

    def _token(self, one: Decoded) -> Token:
        request = self._requests[one.key]
        is_last = one.stop_reason is not None
        if is_last:
            del self._requests[one.key]
        read = None if one.read is None else (one.read.queue_s, one.read.read_s)
        return Token(request.live, one.key, is_last, read, one.decode_queue_s, request.task.transfer_s)
