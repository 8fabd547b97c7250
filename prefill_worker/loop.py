"""The prefill role on the engine thread.

The life of a request here:
  1. `Prefill` arrives: promised to its decode worker (which has set blocks aside), checked, queued.
  2. Chunk by chunk its prompt is computed, first come first served, or the most urgent one first if the
     router tells (scheduler.py); it holds its blocks as a sequence. What the prefix cache has of its
     beginning is not computed (unless its log-probabilities are asked for).
  3. Whatever is computed is offered to the decode worker at once, and leased: what the cache had before the
     first step, blocks as their chunks are done, and of a large chunk the first layers while later ones are
     computed. So when the prompt ends, little is left to copy.
  4. With the last chunk the token that follows is drawn and sent to the router at once, ahead of the last of
     the KV. Only if no hand-off is possible, for there is no link, the router hears of that and of no token.
  5. If that token ends the answer: the offers are withdrawn. Otherwise they are complete.
  6. The decode worker has copied them (or does not want them): blocks given up. The full ones stay in the
     prefix cache until somebody needs their room.
Cancel and the end of the router's stream are legal at any point: the prompt is dropped at the border of the
chunk that is being computed, and what is offered is withdrawn and waits for the decode worker's answer.

A failed hand-off is told to the router by the decode worker, which is the one that waits for it; from here
the router hears only what fails before there is an offer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from prelay.v1 import transfer_pb2, worker_pb2

from engine.block_pool import BlockPool, Holder
from engine.latency import OnlineLatency, StepShape
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
    sampling_of,
    urgency_of,
)
from engine.runner import StepRunner
from engine.sequence import RequestKey
from prefill_worker.prompts import ComputedPart, Prefilled
from prefill_worker.scheduler import PrefillScheduler
from transfer.base import Generations
from transfer.handoff import (
    Abandon,
    Fail,
    Fence,
    Free,
    Lease,
    OfferAction,
    Peer,
    SendComplete,
    SendOffer,
    SendWithdraw,
)
from transfer.layout import Part
from transfer.link import FromPuller, LinkLost, LinkUp, OfferLinkEvent, failure_reason, request_key
from transfer.metrics import LeaseMetrics
from transfer.offer_side import OfferSide

PrefillEvent: TypeAlias = RouterEvent | OfferLinkEvent
PrefillOutput: TypeAlias = RouterBatch | SendOffer | SendComplete | SendWithdraw | Fence

LAYER_GROUPS = 4
"""Of a large chunk this many parts are offered, one after the other as its layers are computed."""

MIN_GROUPED_TOKENS = 128
"""A smaller step is over before a part of it could be copied."""


class PrefillRole:
    """engine.loop.Role of a prefill worker; everything in it belongs to the engine thread.

    generations: the pool's own. num_layers: of the model. max_model_len: most tokens of prompt and answer
    together. vocab_size: 0 if unknown; prompts are not checked against it then. latency: of this worker's
    steps; learns from them. layer_groups: the parts in which a large chunk is offered; 0: not before all of
    it is computed.
    """

    def __init__(
        self,
        runner: StepRunner,
        pool: BlockPool,
        cache: PrefixCache,
        generations: Generations,
        num_layers: int,
        max_batch_tokens: int,
        max_model_len: int,
        vocab_size: int,
        lease_s: float,
        latency: OnlineLatency,
        clock: Callable[[], float],
        metrics: WorkerMetrics,
        leases: LeaseMetrics,
        layer_groups: int = LAYER_GROUPS,
    ) -> None:
        self._runner = runner
        self._pool = pool
        self._cache = cache
        self._generations = generations
        self._layer_groups = layer_groups
        self._num_layers = num_layers
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._clock = clock
        self._metrics = metrics
        self._leases = leases
        self._latency = latency
        self._scheduler = PrefillScheduler(pool, cache, max_batch_tokens, latency)
        self._offers = OfferSide(lease_s)
        # Every request of which this worker still holds something.
        self._owners: dict[RequestKey, Owner] = {}
        # Prompts of the step under way that nobody wants any more.
        self._unwanted: set[RequestKey] = set()
        self._outbox = Outbox()
        self._outputs: list[PrefillOutput] = []
        self._changed = False
        self._show(self._load())

    def handle(self, event: PrefillEvent) -> None:
        self._changed = True
        match event:
            case Command():
                self._outbox.seen(event)
                self._command(event)
            case RouterGone(owner):
                for key in [key for key, of in self._owners.items() if of == owner]:
                    self._cancel(key)
            case LinkUp(link, peer):
                self._apply(self._offers.link_up(link, peer))
            case LinkLost(link):
                self._apply(self._offers.link_lost(link))
            case FromPuller(link, message, arrived_s):
                self._from_puller(link, message, arrived_s)

    def step(self, flush: Callable[[], None]) -> bool:
        now = self._clock()
        self._tick(now)
        self._drop_unwanted()
        chunks = self._scheduler.schedule(now)
        for part in self._scheduler.take_found():
            self._offer(part, 0, self._num_layers)
        if not chunks:
            return False
        self._changed = True
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        num_groups = min(self._layer_groups, self._num_layers if num_tokens >= MIN_GROUPED_TOKENS else 1)
        offering = _LayerGroups(self._num_layers, num_groups, self._offer_layers, flush)
        results = self._runner.step(chunks, offering.on_layer)
        offering.finish()
        self._changed = True  # since the last flush, too
        done_s = self._clock()
        shape = StepShape(tuple((len(chunk.token_ids), chunk.start) for chunk in chunks))
        self._latency.observe(shape, done_s - now)
        self._metrics.stepped(shape, done_s - now)
        self._outbox.stepped(shape, done_s - now)
        for prefilled in self._scheduler.complete(results, done_s):
            self._prefilled(prefilled)
        self._drop_unwanted()
        return True

    def deadline(self) -> float | None:
        return self._offers.deadline()

    def take_outputs(self) -> list[PrefillOutput]:
        outputs, self._outputs = self._outputs, []
        if self._changed:
            self._changed = False
            load = self._load()
            self._show(load)
            outputs.insert(0, self._outbox.take(load, self._cache.take_changes()))  # tokens first
        return outputs

    def recover(self, error: Exception, event: PrefillEvent | None) -> None:
        self._changed = True
        hit: list[tuple[RequestKey, Owner]] = []
        match event:
            case None:
                keys = self._scheduler.abandon()
                hit = [(key, self._owners[key]) for key in keys if key in self._owners]
                self._drop_unwanted()
            case Command(owner, message, _) if message.HasField("prefill"):
                hit = [(owner.key(message.prefill.request_id, message.prefill.attempt), owner)]
            case _:
                pass  # concerns hand-offs only: what is held for them ends with its lease
        for key, owner in hit:
            self._outbox.failed(
                owner, key, worker_pb2.FAILURE_REASON_INTERNAL, f"the engine failed: {error!r}"
            )
            self._scheduler.cancel(key)
            self._owners.pop(key, None)
            self._apply(self._offers.withdraw(key))

    def check(self) -> None:
        held = {
            Holder.SEQUENCE: self._scheduler.num_blocks,
            Holder.CACHE: len(self._cache),
            Holder.TRANSFER: self._offers.num_blocks,
        }
        check_books(self._pool, held)

    def _tick(self, now: float) -> None:
        actions = self._offers.tick(now)
        for action in actions:
            if isinstance(action, Fence):
                self._leases.expired()
        self._apply(actions)

    def _command(self, command: Command) -> None:
        owner, message = command.owner, command.message
        match message.WhichOneof("message"):
            case "prefill":
                self._accept(owner, message.prefill, command.arrived_s)
            case "cancel":
                self._cancel(owner.key(message.cancel.request_id, message.cancel.attempt))
            case "reserve":
                key = owner.key(message.reserve.request_id, message.reserve.attempt)
                self._outbox.failed(
                    owner, key, worker_pb2.FAILURE_REASON_INVALID, "Reserve: this is a prefill worker"
                )

    def _accept(self, owner: Owner, prefill: worker_pb2.Prefill, arrived_s: float) -> None:
        key = owner.key(prefill.request_id, prefill.attempt)
        invalid = worker_pb2.FAILURE_REASON_INVALID
        if key in self._owners:
            self._outbox.failed(owner, key, invalid, "this attempt of the request is here already")
            return
        # Also if it is refused: the link has told the peer since it arrived that it is here.
        self._offers.promise(key, Peer(prefill.decode.worker_id, prefill.decode.epoch))
        if why := self._why_invalid(prefill):
            self._outbox.failed(owner, key, invalid, why)
            self._apply(self._offers.withdraw(key))
            return
        self._owners[key] = owner
        self._scheduler.add(
            key,
            list(prefill.token_ids),
            prefill.num_output_tokens,
            sampling_of(prefill.sampling),
            prefill.cache_salt,
            urgency_of(prefill, arrived_s),
            arrived_s,
        )

    def _why_invalid(self, prefill: worker_pb2.Prefill) -> str | None:
        num_outputs = prefill.num_output_tokens
        num_tokens, max_tokens = len(prefill.token_ids), prefill.sampling.max_tokens - num_outputs
        num_blocks = self._pool.num_blocks_for(num_tokens)
        if num_tokens <= num_outputs or max_tokens < 1:
            return (
                f"{num_tokens - num_outputs} prompt tokens, {num_outputs} tokens of the answer and "
                f"max_tokens {prefill.sampling.max_tokens}: there must be a prompt, and a token to be drawn"
            )
        if num_tokens + max_tokens > self._max_model_len:
            return (
                f"{num_tokens} tokens and {max_tokens} more to be drawn exceed {self._max_model_len} tokens"
            )
        if num_blocks > self._pool.num_blocks:
            return f"{num_tokens} prompt tokens need {num_blocks} KV blocks of {self._pool.num_blocks}"
        if self._vocab_size and (largest := max(prefill.token_ids)) >= self._vocab_size:
            return f"token id {largest} in the prompt: the model's ids are below {self._vocab_size}"
        return None

    def _offer(self, part: ComputedPart, start_layer: int, end_layer: int) -> None:
        if part.key not in self._owners or start_layer == end_layer:
            return
        generations = tuple(int(self._generations[block]) for block in part.blocks)
        offered = Part(part.start_token, part.end_token, start_layer, end_layer, part.blocks, generations)
        self._apply(self._offers.offer(part.key, offered, self._clock()))

    def _offer_layers(self, start_layer: int, end_layer: int) -> None:
        """Of all prompts of the step under way."""
        for part in self._scheduler.parts():
            self._offer(part, start_layer, end_layer)

    def _prefilled(self, done: Prefilled) -> None:
        owner = self._owners.get(done.key)
        if owner is None:
            self._pool.drop(done.blocks, Holder.SEQUENCE)
            return
        self._metrics.hit(done.cached_tokens)
        if done.stop_reason is None:
            self._apply(self._offers.complete(done.key, done.num_tokens, done.first_token))
        else:
            self._apply(self._offers.withdraw(done.key))
        self._pool.drop(done.blocks, Holder.SEQUENCE)
        if done.key in self._owners:  # not, if there is nobody to offer it to
            times = worker_pb2.StageTimes(prefill_queue_s=done.prefill_queue_s, prefill_s=done.prefill_s)
            self._outbox.token(
                owner,
                done.key,
                done.index,
                done.first_token,
                done.stop_reason,
                times,
                logprobs=done.logprobs,
                prompt_logprobs=done.prompt_logprobs,
                cached_tokens=done.cached_tokens,
            )
        if done.stop_reason is not None:
            del self._owners[done.key]

    def _drop_unwanted(self) -> None:
        """Between steps."""
        for key in self._unwanted:
            self._scheduler.cancel(key)
        self._unwanted.clear()

    def _cancel(self, key: RequestKey) -> None:
        if self._scheduler.cancel(key):
            self._owners.pop(key, None)  # gone already, if the hand-off was abandoned
        self._apply(self._offers.withdraw(key))

    def _from_puller(self, link: int, message: transfer_pb2.PullerMessage, arrived_s: float) -> None:
        match message.WhichOneof("message"):
            case "acknowledge":
                self._apply(self._offers.acknowledged(link, request_key(message.acknowledge)))
            case "drop":
                self._apply(self._offers.dropped(link, request_key(message.drop)))
            case "renew":
                self._offers.renewed(link, map(request_key, message.renew.keys), arrived_s)

    def _apply(self, actions: Sequence[OfferAction]) -> None:
        for action in actions:
            match action:
                case Lease(_, blocks):
                    self._pool.add(blocks, Holder.TRANSFER)
                case Free(key, blocks):
                    self._pool.drop(blocks, Holder.TRANSFER)
                    self._owners.pop(key, None)
                    self._changed = True
                case Fail(key, reason, message):
                    self._outbox.failed(self._owners[key], key, failure_reason(reason), message)
                    self._unwanted.add(key)
                case Abandon(key):
                    self._unwanted.add(key)
                case SendOffer() | SendComplete() | SendWithdraw() | Fence():
                    self._outputs.append(action)

    def _show(self, load: Load) -> None:
        self._metrics.show(load)
        self._leases.hold(self._offers.counts())

    def _load(self) -> Load:
        counts, scheduler = self._pool.counts(), self._scheduler
        return Load(
            scheduler.num_running,
            scheduler.num_waiting,
            scheduler.queue_tokens,
            counts.available,
            counts.owned,
            counts.leased,
            counts.cached,
        )


class _LayerGroups:
    """Offers what a step computes while it computes the layers behind it.

    offer: told of layers [start, end) of which the KV of all the step's tokens is stored.
    """

    def __init__(
        self, num_layers: int, num_groups: int, offer: Callable[[int, int], None], flush: Callable[[], None]
    ) -> None:
        self._ends = [num_layers * (group + 1) // num_groups for group in range(num_groups)]
        self._num_layers = num_layers
        self._num_offered = 0
        self._offer = offer
        self._flush = flush

    def on_layer(self, num_stored: int) -> None:
        if num_stored in self._ends:
            self._offer(self._num_offered, num_stored)
            self._num_offered = num_stored
            self._flush()

    def finish(self) -> None:
        """The step is over: all layers are stored, whatever was told of them."""
        self._offer(self._num_offered, self._num_layers)
