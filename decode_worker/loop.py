"""The decode role on the engine thread, and the mixed one, which also reads prompts.

The life of a request here, after a hand-off:
  1. `Reserve` arrives: blocks for the prompt and a little more are set aside (leased), or it is refused at
     once; it is the router that queues. What the prefix cache has of the prompt is part of them, and is not
     sent. When the link to the prefill worker is up the router gets `Reserved`.
  2. The prefill worker offers the prompt's KV as it is computed: the thread of the link copies it while steps
     go on (handoff.py).
  3. All is copied, verified and acknowledged. The blocks now belong to the sequence, which joins the batch at
     the next step, or waits for a place in it. Its first input is the token that the prefill worker drew.
  4. Each step gives every running sequence one token; all tokens of a step go to a router in one message.
     A sequence takes another block when it needs one. If there is none, the one that arrived last gives up
     its blocks, waits, and is computed again from its tokens (places.py); its answer goes on unchanged.
     A router whose client reads slowly can hold a sequence, and let it go on.
  5. A stop token or max_tokens ends the sequence: its full blocks stay in the prefix cache until somebody
     needs their room.
On a mixed worker there are also requests that no prefill worker reads. Of these the life begins with
  1. `Reserve` without a prefill worker: blocks are set aside as before, now the sequence's own.
  2. Steps that decode take chunks of its tokens beside, as many as the others can bear (scheduler.py).
  3. The last chunk draws the first token of its answer, and it goes on with 4.
Cancel and the end of the router's stream are legal at any point: blocks are freed at the border of the
step, or of the copy, that is under way.

Pairs: routers say which prefill workers requests will come from, and are told whether there is a link.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from prelay.v1 import transfer_pb2, worker_pb2

from decode_worker.acceptance import Acceptance, task_of
from decode_worker.pair_owners import PairOwners
from decode_worker.scheduler import DecodeScheduler
from decode_worker.sequences import Decoded, DecodeTask
from engine.block_pool import BlockPool, Holder
from engine.loop import check_books
from engine.metrics import WorkerMetrics
from engine.prefix_cache import PrefixCache
from engine.router_messages import (
    Command,
    Load,
    Outbox,
    Owner,
    RouterBatch,
    RouterEvent,
    RouterGone,
)
from engine.runner import StepRunner
from engine.sequence import RequestKey
from transfer.handoff import (
    ConfirmReserved,
    Connect,
    Deliver,
    Disconnect,
    Fail,
    Free,
    HandoffFailure,
    Lend,
    PairChanged,
    Peer,
    PullAction,
    Recall,
    SendAcknowledge,
    SendDrop,
)
from transfer.link import (
    FetchDone,
    FromOfferer,
    LinkFailed,
    LinkLost,
    LinkUp,
    PullLinkEvent,
    Recalled,
    failure_reason,
    part_of,
    request_key,
)
from transfer.metrics import LeaseMetrics, PullMetrics
from transfer.pull_side import PullSide

DecodeEvent: TypeAlias = RouterEvent | PullLinkEvent
DecodeOutput: TypeAlias = RouterBatch | Connect | Disconnect | Lend | Recall | SendAcknowledge | SendDrop


@dataclass(slots=True)
class _Request:
    """cached_tokens: of the task's tokens, those whose KV was here when it came. kv_bytes: copied for it."""

    owner: Owner
    task: DecodeTask
    cached_tokens: int
    kv_bytes: int = 0


class DecodeRole:
    """engine.loop.Role of a decode or mixed worker; everything in it belongs to the engine thread.

    num_layers: of the model. acceptance: over the same pool.
    """

    def __init__(
        self,
        runner: StepRunner,
        pool: BlockPool,
        cache: PrefixCache,
        num_layers: int,
        scheduler: DecodeScheduler,
        acceptance: Acceptance,
        lease_s: float,
        clock: Callable[[], float],
        metrics: WorkerMetrics,
        leases: LeaseMetrics,
        pulls: PullMetrics,
    ) -> None:
        self._runner = runner
        self._pool = pool
        self._cache = cache
        self._scheduler = scheduler
        self._acceptance = acceptance
        self._clock = clock
        self._metrics = metrics
        self._lease_metrics = leases
        self._pull_metrics = pulls
        self._pulls = PullSide(num_layers, lease_s)
        # Every request of which this worker still holds something.
        self._requests: dict[RequestKey, _Request] = {}
        self._pair_owners = PairOwners()
        self._outbox = Outbox()
        self._outputs: list[DecodeOutput] = []
        self._changed = False
        self._show(self._load())

    def handle(self, event: DecodeEvent) -> None:
        self._changed = True
        now = self._clock()
        match event:
            case Command():
                self._outbox.seen(event)
                self._command(event, now)
            case RouterGone(owner):
                for key in [key for key, request in self._requests.items() if request.owner == owner]:
                    self._cancel(key)
                for peer in self._pair_owners.remove_all(owner):
                    self._apply(self._pulls.unpair(peer))
            case LinkUp(link, peer, backend):
                self._apply(self._pulls.link_up(link, peer, backend, now))
            case LinkFailed(peer, reason, message):
                self._apply(self._pulls.link_failed(peer, reason, message, now))
            case LinkLost(link):
                self._apply(self._pulls.link_lost(link, now))
            case FromOfferer(link, offerer_message, arrived_s):
                self._from_offerer(link, offerer_message, arrived_s)
            case FetchDone():
                self._fetch_done(event)
            case Recalled(key):
                self._apply(self._pulls.recalled(key))

    def step(self, flush: Callable[[], None]) -> bool:
        now = self._clock()
        self._apply(self._pulls.tick(now))
        chunks = self._scheduler.schedule(now)
        preemptions, cached_tokens = self._scheduler.take_counts()
        if preemptions:
            self._changed = True
            self._metrics.preempted(preemptions)
        self._metrics.hit(cached_tokens)
        if not chunks:
            return False
        self._changed = True
        shape = self._scheduler.shape
        results = self._runner.step(chunks)
        done_s = self._clock()
        self._metrics.stepped(shape, done_s - now)
        self._outbox.stepped(shape, done_s - now)
        for decoded in self._scheduler.complete(results, now, done_s):
            self._emit(decoded)
        return True

    def deadline(self) -> float | None:
        return self._pulls.deadline()

    def take_outputs(self) -> list[DecodeOutput]:
        outputs, self._outputs = self._outputs, []
        if self._changed:
            self._changed = False
            load = self._load()
            self._show(load)
            outputs.insert(0, self._outbox.take(load, self._cache.take_changes()))  # tokens first
        return outputs

    def recover(self, error: Exception, event: DecodeEvent | None) -> None:
        self._changed = True
        hit: list[tuple[RequestKey, Owner]] = []
        match event:
            case None:
                hit = [(key, self._requests[key].owner) for key in self._scheduler.abandon()]
            case Command(owner, message, _) if message.HasField("reserve"):
                hit = [(owner.key(message.reserve.request_id, message.reserve.attempt), owner)]
            case _:
                pass  # concerns hand-offs only: what is held for them ends with its lease
        for key, owner in hit:
            self._outbox.failed(
                owner, key, worker_pb2.FAILURE_REASON_INTERNAL, f"the engine failed: {error!r}"
            )
            self._requests.pop(key, None)
            self._apply(self._pulls.cancel(key))

    def check(self) -> None:
        held = {
            Holder.SEQUENCE: self._scheduler.num_blocks,
            Holder.CACHE: len(self._cache),
            Holder.TRANSFER: self._pulls.num_blocks,
        }
        check_books(self._pool, held)

    def _command(self, command: Command, now: float) -> None:
        owner, message = command.owner, command.message
        match message.WhichOneof("message"):
            case "reserve":
                self._reserve(owner, message.reserve, command.arrived_s, now)
            case "cancel":
                self._cancel(owner.key(message.cancel.request_id, message.cancel.attempt))
            case "pair":
                peer = Peer(message.pair.prefill.worker_id, message.pair.prefill.epoch)
                self._pair_owners.add(owner, peer)
                self._apply(self._pulls.pair(peer, message.pair.prefill.address, now))
            case "unpair":
                peer = Peer(message.unpair.prefill.worker_id, message.unpair.prefill.epoch)
                if self._pair_owners.remove(owner, peer):
                    self._apply(self._pulls.unpair(peer))
            case "pause":
                self._hold(owner.key(message.pause.request_id, message.pause.attempt), now, is_held=True)
            case "resume":
                self._hold(owner.key(message.resume.request_id, message.resume.attempt), now, is_held=False)
            case "prefill":
                key = owner.key(message.prefill.request_id, message.prefill.attempt)
                invalid = worker_pb2.FAILURE_REASON_INVALID
                self._outbox.failed(
                    owner, key, invalid, "Prefill: this is a decode worker (a mixed one takes Reserve alone)"
                )

    def _reserve(self, owner: Owner, reserve: worker_pb2.Reserve, arrived_s: float, now: float) -> None:
        key = owner.key(reserve.request_id, reserve.attempt)
        why = self._acceptance.why_invalid(reserve)
        if key in self._requests:
            why = "this attempt of the request is here already"
        if why is not None:
            self._outbox.failed(owner, key, worker_pb2.FAILURE_REASON_INVALID, why)
            return
        digests = self._cache.digests(reserve.token_ids, reserve.cache_salt)
        task = task_of(key, reserve, digests, arrived_s)
        is_read_here = self._acceptance.is_read_here(reserve)
        cached = self._cache.match(
            task.usable_digests(self._pool.block_size) if is_read_here else task.digests
        )
        num_new = self._acceptance.num_blocks(reserve) - len(cached)
        holder = Holder.SEQUENCE if is_read_here else Holder.TRANSFER
        self._pool.add(cached, holder)  # first, so that the rest is not taken from them
        lacks_blocks = self._scheduler.lacks_blocks
        if why := self._acceptance.why_no_room(num_new, len(self._requests), lacks_blocks=lacks_blocks):
            self._pool.drop(cached, holder)
            self._outbox.failed(owner, key, worker_pb2.FAILURE_REASON_NO_BLOCKS, why)
            return
        blocks = cached + self._pool.allocate(num_new, holder)
        cached_tokens = len(cached) * self._pool.block_size
        self._requests[key] = _Request(owner, task, cached_tokens)
        if is_read_here:
            self._scheduler.read(task, blocks, cached_tokens, arrived_s)
            return
        self._metrics.hit(cached_tokens)
        peer = Peer(reserve.prefill.worker_id, reserve.prefill.epoch)
        address = reserve.prefill.address
        self._apply(self._pulls.reserve(key, peer, address, len(task.token_ids), cached_tokens, blocks, now))

    def _hold(self, key: RequestKey, now: float, *, is_held: bool) -> None:
        if (request := self._requests.get(key)) is not None:
            request.task.is_held = is_held
            self._scheduler.hold(key, is_held=is_held, now=now)

    def _cancel(self, key: RequestKey) -> None:
        if self._scheduler.cancel(key):
            del self._requests[key]
        self._apply(self._pulls.cancel(key))

    def _from_offerer(self, link: int, message: transfer_pb2.OffererMessage, arrived_s: float) -> None:
        match message.WhichOneof("message"):
            case "offer":
                key, part = request_key(message.offer.key), part_of(message.offer)
                self._apply(self._pulls.offered(link, key, part, arrived_s))
            case "complete":
                done = message.complete
                key, first_token = request_key(done.key), done.first_token
                self._apply(self._pulls.completed(link, key, done.num_tokens, first_token, arrived_s))
            case "withdraw":
                self._apply(self._pulls.withdrawn(link, request_key(message.withdraw)))
            case "renew":
                self._pulls.renewed(link, map(request_key, message.renew.keys), arrived_s)

    def _fetch_done(self, done: FetchDone) -> None:
        if done.is_digest_good is not None:
            self._pull_metrics.checked(is_good=done.is_digest_good)
        if done.error is not None:
            self._apply(self._pulls.fetch_failed(done.key, done.error))
            return
        self._pull_metrics.copied(done.backend, done.num_bytes, done.copy_s)
        if (request := self._requests.get(done.key)) is not None:
            request.kv_bytes += done.num_bytes
        self._apply(self._pulls.fetched(done.key, done.ended_s))

    def _emit(self, decoded: Decoded) -> None:
        request, read = self._requests[decoded.key], decoded.read
        times = None
        if read is not None:
            times = worker_pb2.StageTimes(prefill_queue_s=read.queue_s, prefill_s=read.read_s)
        elif decoded.decode_queue_s is not None:
            times = worker_pb2.StageTimes(
                transfer_s=request.task.transfer_s,
                decode_queue_s=decoded.decode_queue_s,
                kv_bytes=request.kv_bytes,
            )
        self._outbox.token(
            request.owner,
            decoded.key,
            decoded.index,
            decoded.token_id,
            decoded.stop_reason,
            times,
            logprobs=decoded.logprobs,
            prompt_logprobs=() if read is None else read.prompt_logprobs,
            cached_tokens=0 if read is None else read.cached_tokens,
        )
        if decoded.stop_reason is not None:
            del self._requests[decoded.key]

    def _apply(self, actions: Sequence[PullAction]) -> None:
        for action in actions:
            match action:
                case Free(key, blocks):
                    self._pool.drop(blocks, Holder.TRANSFER)
                    self._requests.pop(key, None)
                    self._changed = True
                case Fail(key, reason, message):
                    self._pull_metrics.failed(reason)
                    if reason is HandoffFailure.LEASE_EXPIRED:
                        self._lease_metrics.expired()
                    self._outbox.failed(self._requests[key].owner, key, failure_reason(reason), message)
                case ConfirmReserved(key):
                    request = self._requests[key]
                    self._outbox.reserved(request.owner, key, request.cached_tokens)
                case PairChanged():
                    self._pair_changed(action)
                case Deliver():
                    self._deliver(action)
                case Connect() | Disconnect() | Lend() | Recall() | SendAcknowledge() | SendDrop():
                    self._outputs.append(action)

    def _deliver(self, action: Deliver) -> None:
        task = self._requests[action.key].task
        task.transfer_s = action.transfer_s
        self._pull_metrics.delivered(action.transfer_s)
        self._pool.add(action.blocks, Holder.SEQUENCE)
        self._pool.drop(action.blocks, Holder.TRANSFER)
        self._scheduler.add(task, action.first_token, action.blocks, action.ready_s)

    def _pair_changed(self, change: PairChanged) -> None:
        state = worker_pb2.PairState(
            worker_id=change.peer.worker_id, epoch=change.peer.epoch, linked=change.reason is None
        )
        if change.reason is None:
            state.backend = change.message
        else:
            state.reason, state.message = failure_reason(change.reason), change.message
        for owner in self._pair_owners.of(change.peer):
            self._outbox.pair(owner, state)

    def _show(self, load: Load) -> None:
        self._metrics.show(load)
        self._lease_metrics.hold(self._pulls.counts())

    def _load(self) -> Load:
        counts, scheduler = self._pool.counts(), self._scheduler
        handing_over = sum(self._pulls.counts().values())
        decoding, context = scheduler.decoding
        return Load(
            scheduler.num_running,
            scheduler.num_waiting + handing_over,
            scheduler.queue_tokens,
            counts.available,
            counts.owned,
            counts.leased,
            counts.cached,
            decoding,
            context,
            (scheduler.least_tpot_s or 0.0) if decoding else 0.0,
            scheduler.ahead_s if decoding else 0.0,
        )
