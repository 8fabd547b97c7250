"""A prefill and a decode worker around the hand-off's machines: their shells and schedulers, in brief.

The shells as in offer_links.py and pull_links.py: the asyncio thread knows what is held, starts copies of
what is lent when offers arrive, and tells the engine thread, which may be in a step, of both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from engine.block_pool import Holder
from engine.sequence import RequestKey
from tests.transfer.simulation import BLOCK_SIZE, LEASE_S, NUM_LAYERS, Link, Tag, Timeline, Worker
from transfer import handoff as act
from transfer.handoff import HandoffFailure, Peer
from transfer.layout import Part
from transfer.offer_side import OfferSide, OfferState
from transfer.pull_side import PullSide


@dataclass
class Request:
    """One attempt.

    tags: of its prompt's blocks. is_sampled: its offers carry digests. is_doubled: the router says something
    twice, so that what is over may begin anew.
    """

    key: RequestKey
    num_tokens: int
    tags: Sequence[Tag]
    prefill: PrefillWorker
    decode: DecodeWorker
    is_sampled: bool
    is_doubled: bool = False

    @property
    def first_token(self) -> int:
        return 1000 + self.num_tokens

    def cell(self, index: int, layer: int) -> object:
        """What a block holds in one layer."""
        return (*self.tags[index], layer)


class Router(Protocol):
    """What workers tell it."""

    def failed(self, request: Request, worker: Worker, why: str) -> None: ...
    def ended(self, request: Request, outcome: str) -> None: ...
    def reserved(self, request: Request) -> None: ...
    def prefill_at(self, peer: Peer) -> PrefillWorker | None: ...
    def next_link(self) -> int: ...


@dataclass(eq=False)
class Prompt:
    request: Request
    blocks: list[int]
    num_computed: int


class PrefillWorker(Worker):
    """does_not_fit: no puller's handshake fits it."""

    def __init__(self, time: Timeline, epoch: int, router: Router, does_not_fit: bool = False) -> None:
        self.offers = OfferSide(LEASE_S)
        super().__init__(time, Peer("prefill", epoch), self.offers)
        self.router = router
        self.does_not_fit = does_not_fit
        self.owners: dict[RequestKey, Request] = {}
        self.prompts: dict[RequestKey, Prompt] = {}
        self._told: set[RequestKey] = set()

    # --- the router's commands

    def prefill(self, request: Request) -> None:
        """In the asyncio thread."""
        for link in self.links.values():
            if link.open[self] and link.puller.peer == request.decode.peer:
                link.hold(self, request.key)
        self.post(self._accept, request)

    def cancel(self, key: RequestKey) -> None:
        if (prompt := self.prompts.pop(key, None)) is not None:
            self.pool.drop(prompt.blocks, Holder.SEQUENCE)
            self.owners.pop(key, None)
        elif (entry := self.offers._entries.get(key)) is not None and entry.state is OfferState.PROMISED:
            self.owners.pop(key, None)  # it waits for blocks
        self.see("withdraw", key)
        self.apply(self.offers.withdraw(key))

    def router_gone(self) -> None:
        for key in list(self.owners):
            self.cancel(key)

    # --- the life of a prompt

    def _accept(self, request: Request) -> None:
        key = request.key
        if key in self.owners or key in self.offers._entries:
            return
        self.see("promise", key)
        self.offers.promise(key, request.decode.peer)
        if self.time.chance(0.03):
            self.router.ended(request, "refused")
            self.see("withdraw", key)
            self.apply(self.offers.withdraw(key))
            return
        self.owners[key] = request
        self._start(request)

    def _start(self, request: Request) -> None:
        if self.owners.get(request.key) is not request or request.key in self.prompts:
            return
        cached = self.cache.match(request.tags[: (request.num_tokens - 1) // BLOCK_SIZE])
        num_new = len(request.tags) - len(cached)
        self.pool.add(cached, Holder.SEQUENCE)
        if not self.pool.can_allocate(num_new):
            self.pool.drop(cached, Holder.SEQUENCE)
            self.time.after(0.5, self.arrive, self._start, request)
            return
        prompt = Prompt(request, cached + self.pool.allocate(num_new, Holder.SEQUENCE), len(cached))
        self.prompts[request.key] = prompt
        if cached:
            self._offer(prompt, 0, len(cached), 0, NUM_LAYERS)
        self._later(self._step, prompt)

    def _later(self, do: Any, prompt: Prompt) -> None:
        delay_s = self.time.delay() * self.time.random.choice([0.5, 1, 4])
        self.time.after(delay_s, self.arrive, do, prompt)

    def _step(self, prompt: Prompt) -> None:
        """The first layers of a chunk are computed. The engine is in a step: events wait."""
        if self._is_wanted(prompt):
            start, end = prompt.num_computed, len(prompt.blocks)
            end = min(end, start + self.time.random.randint(1, 3))
            num_layers = self.time.random.choice([0, 1, 2])
            self._compute(prompt, start, end, 0, num_layers)
            delay_s = self.time.delay() if num_layers else 0.0
            self.time.after(delay_s, self.arrive, self._end_step, prompt, start, end, num_layers)

    def _end_step(self, prompt: Prompt, start: int, end: int, layer: int) -> None:
        if not self._is_wanted(prompt):
            return
        self._compute(prompt, start, end, layer, NUM_LAYERS)
        prompt.num_computed = end
        if end < len(prompt.blocks):
            self._later(self._step, prompt)
        elif self._is_wanted(prompt):
            self._finish(prompt)

    def _is_wanted(self, prompt: Prompt) -> bool:
        key = prompt.request.key
        if self.prompts.get(key) is not prompt:
            return False
        if key not in self.owners:
            assert key in self._told, f"{key} was abandoned in silence"
            del self.prompts[key]
            self.pool.drop(prompt.blocks, Holder.SEQUENCE)
            return False
        return True

    def _compute(self, prompt: Prompt, start: int, end: int, first: int, last: int) -> None:
        self.time.moved()
        for index in range(start, end):
            for layer in range(first, last):
                self.memory[prompt.blocks[index]][layer] = prompt.request.cell(index, layer)
        if first < last:
            self._offer(prompt, start, end, first, last)

    def _offer(self, prompt: Prompt, start: int, end: int, first: int, last: int) -> None:
        request = prompt.request
        if request.key not in self.owners:
            return
        blocks = tuple(prompt.blocks[start:end])
        generations = tuple(self.generations[block] for block in blocks)
        end_token = min(end * BLOCK_SIZE, request.num_tokens)
        part = Part(start * BLOCK_SIZE, end_token, first, last, blocks, generations)
        self.see("offer", request.key)
        self.apply(self.offers.offer(request.key, part, self.time.now))

    def _finish(self, prompt: Prompt) -> None:
        request, key = prompt.request, prompt.request.key
        self.cache.insert(request.tags[: request.num_tokens // BLOCK_SIZE], prompt.blocks)
        if self.time.chance(0.05):
            self.router.ended(request, "ended with its first token")
            self.see("withdraw", key)
            self.apply(self.offers.withdraw(key))
            self.owners.pop(key, None)
        else:
            self.see("complete", key)
            self.apply(self.offers.complete(key, request.num_tokens, request.first_token))
        del self.prompts[key]
        self.pool.drop(prompt.blocks, Holder.SEQUENCE)

    # --- links

    def link_up(self, link: Link) -> None:
        for entry in self.offers._entries.values():
            if entry.peer.worker_id == link.puller.peer.worker_id:
                self.time.seen.add((entry.state.value, "link up"))
        self.apply(self.offers.link_up(link.number, link.puller.peer))

    def link_lost(self, link: Link) -> None:
        if link.number in self.offers._links:
            self.see_all("link lost", link.puller.peer)
        self.apply(self.offers.link_lost(link.number))

    def received(self, link: Link, kind: str, key: RequestKey, payload: Any) -> None:
        if kind != "renew":
            link.release(self, key)
        self.post(self.receive, link, kind, key, payload, self.time.now)

    def receive(self, link: Link, kind: str, key: RequestKey, payload: Any, arrived_s: float) -> None:
        match kind:
            case "acknowledge":
                self.see("acknowledged", key)
                self.apply(self.offers.acknowledged(link.number, key))
            case "drop":
                self.see("dropped", key)
                self.apply(self.offers.dropped(link.number, key))
            case "renew":
                for each in payload:
                    self.see("renewed", each)
                self.offers.renewed(link.number, payload, arrived_s)

    # --- what the machine asks for

    def apply(self, actions: Sequence[Any]) -> None:
        for action in actions:
            match action:
                case act.Lease(_, blocks):
                    self.pool.add(blocks, Holder.TRANSFER)
                case act.Free(key, blocks):
                    self._check_unread(key)
                    self.pool.drop(blocks, Holder.TRANSFER)
                    self.owners.pop(key, None)
                    self.freeing()
                case act.Fail(key, reason):
                    self._told.add(key)
                    self.router.failed(self.owners[key], self, reason.value)
                case act.Abandon(key):
                    self._told.add(key)
                case act.SendOffer(number, key, part):
                    link = self.links[number]
                    link.send(self, "offer", key, self._with_digests(key, part))
                case act.SendComplete(number, key, num_tokens, first_token):
                    self.links[number].send(self, "complete", key, (num_tokens, first_token))
                case act.SendWithdraw(number, key):
                    self.links[number].release(self, key)
                    self.links[number].send(self, "withdraw", key)
                case act.Fence(number):
                    self.links[number].close(self)
                case _:
                    raise AssertionError(f"{action} is none of the prefill side's")

    def _with_digests(self, key: RequestKey, part: Part) -> Part:
        """The digest of a simulated block is what it holds."""
        if not self.owners[key].is_sampled:
            return part
        held = (tuple(self.memory[b][part.start_layer : part.end_layer]) for b in part.blocks)
        where = (part.start_token, part.end_token, part.start_layer, part.end_layer)
        return Part(*where, part.blocks, part.generations, cast(tuple[int, ...], tuple(held)))

    def _check_unread(self, key: RequestKey) -> None:
        """Nobody reads what is freed, unless the link it was offered on is closed."""
        for link in self.links.values():
            if link.open[self]:
                for copy in cast(DecodeWorker, link.puller).copies_of(key):
                    if copy.link is link and link.puller.alive:
                        assert copy.request.is_doubled, f"{key} was freed under its reader"


@dataclass(eq=False)
class Copy:
    """pairs: (source block, our block)."""

    link: Link
    request: Request
    part: Part
    pairs: list[tuple[int, int]]


@dataclass
class _Sequence:
    request: Request
    blocks: tuple[int, ...] = field(default=())


class DecodeWorker(Worker):
    def __init__(self, time: Timeline, epoch: int, router: Router) -> None:
        self.pulls = PullSide(NUM_LAYERS, LEASE_S)
        super().__init__(time, Peer("decode", epoch), self.pulls)
        self.router = router
        self.requests: dict[RequestKey, Request] = {}
        self.sequences: dict[RequestKey, _Sequence] = {}
        self.pairs: dict[Peer, None] = {}
        self._lent: dict[RequestKey, act.Lend] = {}
        self._copiers: dict[int, deque[Copy]] = {}
        self._to_return: set[RequestKey] = set()
        self._cancelled: set[RequestKey] = set()
        self._failed: set[RequestKey] = set()

    # --- the router's commands, in the engine thread

    def pair(self, peer: Peer) -> None:
        self.pairs[peer] = None
        self.apply(self.pulls.pair(peer, "address", self.time.now))

    def unpair(self, peer: Peer) -> None:
        self.pairs.pop(peer, None)
        self.see_all("unpair", peer)
        self.apply(self.pulls.unpair(peer))

    def reserve(self, request: Request) -> None:
        key = request.key
        if key in self.requests:
            return
        cached = self.cache.match(request.tags[: request.num_tokens // BLOCK_SIZE])
        num_new = self.pool.num_blocks_for(request.num_tokens + self.time.random.randint(1, 4)) - len(cached)
        self.pool.add(cached, Holder.TRANSFER)
        if not self.pool.can_allocate(num_new):
            self.pool.drop(cached, Holder.TRANSFER)
            self.router.ended(request, "no blocks")
            return
        blocks = cached + self.pool.allocate(num_new, Holder.TRANSFER)
        self.requests[key] = request
        skip, peer = len(cached) * BLOCK_SIZE, request.prefill.peer
        self.see("reserve", key)
        self.apply(self.pulls.reserve(key, peer, "address", request.num_tokens, skip, blocks, self.time.now))

    def cancel(self, key: RequestKey) -> None:
        if (sequence := self.sequences.pop(key, None)) is not None:
            self.pool.drop(sequence.blocks, Holder.SEQUENCE)
            del self.requests[key]
        self._cancelled.add(key)
        self.see("cancel", key)
        self.apply(self.pulls.cancel(key))

    def router_gone(self) -> None:
        for key in list(self.requests):
            self.cancel(key)
        for peer in list(self.pairs):
            self.unpair(peer)

    # --- links

    def _dial(self, peer: Peer) -> None:
        time = self.time
        prefill = self.router.prefill_at(peer)
        if prefill is None or not prefill.alive or time.chance(time.faults / 4):
            self._cannot_dial(peer, HandoffFailure.PEER_UNREACHABLE, time.delay())
            return
        epochs = [link.puller.peer.epoch for link in prefill.links.values() if link.open[prefill]]
        if prefill.does_not_fit or max(epochs, default=0) > self.peer.epoch:
            self._cannot_dial(peer, HandoffFailure.PEER_MISMATCH, time.delay())
        elif time.now < prefill.frozen_until:
            self._cannot_dial(peer, HandoffFailure.PEER_UNREACHABLE, 1.5)
        else:
            for old in list(prefill.links.values()):
                old.close(prefill)
            link = Link(time, self.router.next_link(), prefill, self)
            prefill.links[link.number] = self.links[link.number] = link
            link.open[prefill] = True
            prefill.post(prefill.link_up, link)
            time.after(time.delay(), self.arrive, self._dialled, link)

    def _cannot_dial(self, peer: Peer, reason: HandoffFailure, delay_s: float) -> None:
        self.time.after(delay_s, self.arrive, self.post, self._link_failed, peer, reason)

    def _dialled(self, link: Link) -> None:
        if link.carries:
            link.open[self] = True
            self.post(self._link_up, link)
        else:
            self.post(self._link_failed, link.offerer.peer, HandoffFailure.PEER_UNREACHABLE)

    def _link_up(self, link: Link) -> None:
        self.time.moved()
        self.see_all("link up", link.offerer.peer)
        self.apply(self.pulls.link_up(link.number, link.offerer.peer, "simulated", self.time.now))

    def _link_failed(self, peer: Peer, reason: HandoffFailure) -> None:
        self.time.moved()
        self.see_all("link failed", peer)
        self.apply(self.pulls.link_failed(peer, reason, "nobody there", self.time.now))

    def link_lost(self, link: Link) -> None:
        if self.pulls._dialling.is_up(link.number):
            self.see_all("link lost", link.offerer.peer)
        self.apply(self.pulls.link_lost(link.number, self.time.now))

    def received(self, link: Link, kind: str, key: RequestKey, payload: Any) -> None:
        if kind in ("offer", "complete"):
            link.hold(self, key)
        lend = self._lent.get(key)
        if lend is not None and lend.link == link.number:
            if kind == "offer":
                self._submit(self._copy(link, lend, payload))
            elif kind == "complete":
                del self._lent[key]
        self.post(self.receive, link, kind, key, payload, self.time.now)

    def receive(self, link: Link, kind: str, key: RequestKey, payload: Any, arrived_s: float) -> None:
        match kind:
            case "offer":
                self.see("offered", key)
                self.apply(self.pulls.offered(link.number, key, payload, arrived_s))
            case "complete":
                self.see("completed", key)
                num_tokens, first_token = payload
                self.apply(self.pulls.completed(link.number, key, num_tokens, first_token, arrived_s))
            case "withdraw":
                self.see("withdrawn", key)
                self.apply(self.pulls.withdrawn(link.number, key))
            case "renew":
                for each in payload:
                    self.see("renewed", each)
                self.pulls.renewed(link.number, payload, arrived_s)

    # --- copies: a thread for each link, in which they are made one after the other

    def copies_of(self, key: RequestKey) -> list[Copy]:
        """Those that run or wait."""
        return [job for jobs in self._copiers.values() for job in jobs if job.request.key == key]

    def _copy(self, link: Link, lend: act.Lend, part: Part) -> Copy:
        first = part.start_token // BLOCK_SIZE
        targets = lend.table[first : first + len(part.blocks)]
        skip = max(0, lend.skip_tokens // BLOCK_SIZE - first)
        pairs = list(zip(part.blocks, targets, strict=True))[skip:]
        return Copy(link, self.requests[lend.key], part, pairs)

    def _submit(self, job: Copy) -> None:
        jobs = self._copiers.setdefault(job.link.number, deque())
        jobs.append(job)
        if len(jobs) == 1:
            self.time.after(0.0, self.arrive, self._begin, job)

    def _begin(self, job: Copy) -> None:
        half = len(job.pairs) // 2
        self._write(job, job.pairs[:half])
        delay_s = self.time.delay() * self.time.random.choice([0.1, 0.3, 1, 6])
        self.time.moves_until(self.time.now + delay_s)
        self.time.after(delay_s, self.arrive, self._end, job, half)

    def _end(self, job: Copy, half: int) -> None:
        self._write(job, job.pairs[half:])
        error = self._judge(job)
        jobs, key = self._copiers[job.link.number], job.request.key
        jobs.popleft()
        if jobs:
            self.time.after(0.0, self.arrive, self._begin, jobs[0])
        self.time.moved()
        self.post(self._fetch_done, key, error, self.time.now)
        if key in self._to_return and not self.copies_of(key):
            self._give_back(key)

    def _recall(self, key: RequestKey) -> None:
        self._lent.pop(key, None)
        self._to_return.add(key)
        if not self.copies_of(key):
            self.time.after(0.0, self.arrive, self._give_back, key)

    def _give_back(self, key: RequestKey) -> None:
        if key in self._to_return:
            self._to_return.remove(key)
            self.post(self._recalled, key)

    def _write(self, job: Copy, pairs: list[tuple[int, int]]) -> None:
        """A copy takes time: half of the blocks at one, half at another."""
        layers = slice(job.part.start_layer, job.part.end_layer)
        for remote, local in pairs:
            assert local not in self.cache._tags, "somebody wrote into a cached block"
            self.memory[local][layers] = job.link.offerer.memory[remote][layers]

    def _judge(self, job: Copy) -> str | None:
        part, offerer, faults = job.part, job.link.offerer, self.time.faults
        if not job.link.carries and not offerer.alive and self.time.chance(0.5):
            return "unreachable"
        if self.time.chance(faults / 20):
            job.link.close(self)
            return "unreachable"
        if job.pairs and part.digests and self.time.chance(faults / 10):
            self.memory[job.pairs[-1][1]][part.start_layer] = "other bytes"  # and no error says so
        found = [offerer.generations[block] for block in part.blocks]
        if tuple(found) != part.generations:
            return "stale"
        if part.digests:
            held: dict[int, object] = dict(zip(part.blocks, part.digests, strict=True))
            for remote, local in job.pairs:
                if tuple(self.memory[local][part.start_layer : part.end_layer]) != held[remote]:
                    self.time.seen.add(("digest", "differs"))
                    return "digest"
        return None

    def _fetch_done(self, key: RequestKey, error: str | None, ended_s: float) -> None:
        if error is None:
            self.see("fetched", key)
            self.apply(self.pulls.fetched(key, ended_s))
        else:
            self.see("fetch failed", key)
            self.apply(self.pulls.fetch_failed(key, error))

    def _recalled(self, key: RequestKey) -> None:
        self.see("recalled", key)
        self.apply(self.pulls.recalled(key))

    # --- what the machine asks for

    def apply(self, actions: Sequence[Any]) -> None:
        for action in actions:
            match action:
                case act.Free(key, blocks):
                    self._check_still(key)
                    self.pool.drop(blocks, Holder.TRANSFER)
                    del self.requests[key]
                    self.freeing()
                case act.Fail(key, reason):
                    request = self.requests[key]
                    assert key not in self._failed or request.is_doubled, f"{key} failed twice"
                    self._failed.add(key)
                    self.router.failed(request, self, reason.value)
                case act.Connect(peer):
                    self.time.after(self.time.delay(), self.arrive, self._dial, peer)
                case act.Disconnect(number):
                    self.links[number].close(self)
                case act.PairChanged():
                    pass  # routers place requests whatever they are told: the harder case
                case act.Lend(_, key):
                    self._check_still(key)
                    self._lent[key] = action
                case act.Recall(key):
                    self._recall(key)
                case act.ConfirmReserved(key):
                    self.time.after(self.time.delay(), self.router.reserved, self.requests[key])
                case act.SendAcknowledge(number, key):
                    self._check_still(key)
                    self.links[number].release(self, key)
                    self.links[number].send(self, "acknowledge", key)
                case act.SendDrop(number, key):
                    self.links[number].release(self, key)
                    self.links[number].send(self, "drop", key)
                case act.Deliver():
                    self._deliver(action)
                case _:
                    raise AssertionError(f"{action} is none of the decode side's")

    def _check_still(self, key: RequestKey) -> None:
        """No copy runs, and none could start."""
        assert not self.copies_of(key), f"a copy for {key} runs or waits"
        assert key not in self._lent, f"{key} is still lent"

    def _deliver(self, action: act.Deliver) -> None:
        key = action.key
        request = self.requests[key]
        self._check_still(key)
        assert key not in self._cancelled or request.is_doubled, f"{key} was delivered twice or after cancel"
        assert action.first_token == request.first_token
        self.router.ended(request, "delivered")
        sequence = _Sequence(request, action.blocks)
        self._check_kv(sequence)
        self.pool.add(action.blocks, Holder.SEQUENCE)
        self.pool.drop(action.blocks, Holder.TRANSFER)
        self.sequences[key] = sequence
        self.cache.insert(request.tags[: request.num_tokens // BLOCK_SIZE], action.blocks)
        self.time.after(self.time.random.uniform(0, 3), self.arrive, self._finish, sequence)

    def _finish(self, sequence: _Sequence) -> None:
        key = sequence.request.key
        if self.sequences.get(key) is sequence:
            self._check_kv(sequence)
            self.cancel(key)

    def _check_kv(self, sequence: _Sequence) -> None:
        """No token from wrong KV."""
        request = sequence.request
        for index, block in zip(range(len(request.tags)), sequence.blocks, strict=False):
            wanted = [request.cell(index, layer) for layer in range(NUM_LAYERS)]
            assert self.memory[block] == wanted, f"{request.key} reads {self.memory[block]}, wants {wanted}"
