"""The prefill role on the engine thread.

The life of a request here:
  1. `Prefill` arrives: promised to its decode worker (which has set blocks aside), checked, queued.
  2. Chunk by chunk its prompt is computed, first come first served; it holds its blocks as a sequence. What
     the prefix cache has of its beginning is not computed (unless its log-probabilities are asked for).
  3. With the last chunk the first token is drawn and sent to the router at once, ahead of the KV. Only if no
     hand-off can even begin, for there is no link, the router hears of that and of no token: the client has
     seen nothing yet, so the request can be placed anew.
  4. If that token ends the answer: blocks freed, the decode worker is told that nothing will come.
     Otherwise the blocks become leased and are offered to the decode worker.
  5. The decode worker has copied them (or does not want them): blocks given up. The full ones stay in the
     prefix cache until somebody needs their room.
Cancel and the end of the router's stream are legal at any point: before 4 the request is dropped, at the
border of the chunk that is being computed; after it the offer is withdrawn and the blocks wait for the
decode worker's answer.

A failed hand-off is told to the router by the decode worker, which is the one that waits for it; from here
the router hears only what fails before there is an offer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from prelay.v1 import transfer_pb2, worker_pb2

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
    sampling_of,
)
from engine.runner import StepRunner
from engine.sequence import RequestKey
from prefill_worker.scheduler import Prefilled, PrefillScheduler
from transfer.base import Generations
from transfer.handoff import Fail, Fence, Free, OfferAction, Peer, SendOffer, SendWithdraw
from transfer.link import FromPuller, LinkLost, LinkUp, OfferLinkEvent, failure_reason, request_key
from transfer.metrics import LeaseMetrics
from transfer.offer_side import OfferSide

PrefillEvent: TypeAlias = RouterEvent | OfferLinkEvent
PrefillOutput: TypeAlias = RouterBatch | SendOffer | SendWithdraw | Fence


class PrefillRole:
    """engine.loop.Role of a prefill worker; everything in it belongs to the engine thread.

    generations: the pool's own. max_model_len: most tokens of prompt and answer together. vocab_size: 0 if
    unknown; prompts are not checked against it then.
    """

    def __init__(
        self,
        runner: StepRunner,
        pool: BlockPool,
        cache: PrefixCache,
        generations: Generations,
        max_batch_tokens: int,
        max_model_len: int,
        vocab_size: int,
        lease_s: float,
        clock: Callable[[], float],
        metrics: WorkerMetrics,
        leases: LeaseMetrics,
    ) -> None:
        self._runner = runner
        self._pool = pool
        self._cache = cache
        self._generations = generations
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._clock = clock
        self._metrics = metrics
        self._leases = leases
        self._scheduler = PrefillScheduler(pool, cache, max_batch_tokens)
        self._offers = OfferSide(lease_s)
        # Every request of which this worker still holds something.
        self._owners: dict[RequestKey, Owner] = {}
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

    def step(self) -> bool:
        now = self._clock()
        self._tick(now)
        chunks = self._scheduler.schedule(now)
        if not chunks:
            return False
        self._changed = True
        results = self._runner.step(chunks)
        done_s = self._clock()
        self._metrics.stepped(done_s - now, sum(len(chunk.token_ids) for chunk in chunks))
        for prefilled in self._scheduler.complete(results, done_s):
            self._prefilled(prefilled, done_s)
        return True

    def deadline(self) -> float | None:
        return self._offers.deadline()

    def take_outputs(self) -> list[PrefillOutput]:
        outputs, self._outputs = self._outputs, []
        if self._changed:
            self._changed = False
            load = self._load()
            self._show(load)
            outputs.append(self._outbox.take(load))
        return outputs

    def recover(self, error: Exception, event: PrefillEvent | None) -> None:
        self._changed = True
        hit: list[tuple[RequestKey, Owner]] = []
        match event:
            case None:
                hit = [(key, self._owners[key]) for key in self._scheduler.abandon()]
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
        token_ids, sampling = list(prefill.token_ids), sampling_of(prefill.sampling)
        self._scheduler.add(key, token_ids, sampling, prefill.cache_salt, arrived_s)

    def _why_invalid(self, prefill: worker_pb2.Prefill) -> str | None:
        num_tokens, max_tokens = len(prefill.token_ids), prefill.sampling.max_tokens
        num_blocks = self._pool.num_blocks_for(num_tokens)
        if not num_tokens or not max_tokens:
            return f"{num_tokens} prompt tokens and max_tokens {max_tokens}: both must be at least 1"
        if num_tokens + max_tokens > self._max_model_len:
            return (
                f"{num_tokens} prompt tokens and max_tokens {max_tokens} exceed {self._max_model_len} tokens"
            )
        if num_blocks > self._pool.num_blocks:
            return f"{num_tokens} prompt tokens need {num_blocks} KV blocks of {self._pool.num_blocks}"
        if self._vocab_size and (largest := max(prefill.token_ids)) >= self._vocab_size:
            return f"token id {largest} in the prompt: the model's ids are below {self._vocab_size}"
        return None

    def _prefilled(self, done: Prefilled, now: float) -> None:
        owner = self._owners[done.key]
        self._metrics.hit(done.cached_tokens)
        if done.stop_reason is None:
            self._pool.add(done.blocks, Holder.TRANSFER)
            generations = [int(self._generations[block]) for block in done.blocks]
            self._apply(
                self._offers.offer(done.key, done.blocks, generations, done.num_tokens, done.first_token, now)
            )
        else:
            self._apply(self._offers.withdraw(done.key))
        self._pool.drop(done.blocks, Holder.SEQUENCE)
        if done.key in self._owners:  # not, if there is nobody to offer it to
            times = worker_pb2.StageTimes(prefill_queue_s=done.prefill_queue_s, prefill_s=done.prefill_s)
            self._outbox.token(
                owner,
                done.key,
                0,
                done.first_token,
                done.stop_reason,
                times,
                logprobs=done.logprobs,
                prompt_logprobs=done.prompt_logprobs,
                cached_tokens=done.cached_tokens,
            )
        if done.stop_reason is not None:
            del self._owners[done.key]

    def _cancel(self, key: RequestKey) -> None:
        if self._scheduler.cancel(key):
            del self._owners[key]
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
                case Free(key, blocks):
                    self._pool.drop(blocks, Holder.TRANSFER)
                    self._owners.pop(key, None)
                    self._changed = True
                case Fail(key, reason, message):
                    self._outbox.failed(self._owners[key], key, failure_reason(reason), message)
                case SendOffer() | SendWithdraw() | Fence():
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
