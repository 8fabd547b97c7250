"""Both state machines against each other over a link that delays, breaks and goes silent, with crashes,
cancels, frozen processes and virtual time: thousands of random schedules, each of which can be repeated by
its seed. Engines make steps of several leases, during which events wait for them and links beat.

Blocks hold tags that say whose data they are, so a copy of the wrong, of recycled or of half-recycled
blocks is seen for what it is. Other sequences come and go on both pools to recycle what is freed.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from engine.block_pool import BlockPool, Holder
from engine.sequence import RequestKey
from transfer import handoff as act
from transfer.handoff import HandoffFailure, Peer
from transfer.offer_side import OfferSide
from transfer.pull_side import PullSide

LEASE_S = 4.0
NUM_BLOCKS = 16
BLOCK_SIZE = 2


class Life:
    """One life of one worker: its machine, its blocks and what they hold."""

    def __init__(self, name: str, epoch: int, machine: Any) -> None:
        self.peer = Peer(name, epoch)
        self.machine = machine
        self.generations = [0] * NUM_BLOCKS
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE, self.generations)
        self.memory: list[object] = [None] * NUM_BLOCKS
        self.alive = True
        # A long step: events arrive and wait. Frozen: the process does nothing, nor do its links beat.
        self.in_step_until = 0.0
        self.frozen_until = 0.0
        self.inbox: list[Callable[[], None]] = []
        self.wake_at: float | None = None
        self.last_command = 0.0
        # Prefill: blocks of prompts that are being computed. Decode: of sequences that run.
        self.sequences: dict[RequestKey, list[int]] = {}
        self.cancelled: set[RequestKey] = set()


@dataclass(frozen=True)
class Renew:
    link: int
    keys: tuple[RequestKey, ...]


class Link:
    def __init__(self, number: int, offerer: Life, puller: Life) -> None:
        self.number = number
        self.offerer, self.puller = offerer, puller
        self.open = {offerer: False, puller: False}
        self.carries = True
        self.last = {offerer: 0.0, puller: 0.0}
        self.held: dict[Life, set[RequestKey]] = {offerer: set(), puller: set()}
        self.beating = {offerer: False, puller: False}


class Schedule:
    """One random run. faults: how likely anything goes wrong. cancels: how likely a request is given up."""

    def __init__(self, seed: int, faults: float, cancels: float) -> None:
        self.random = random.Random(seed)
        self.faults = faults
        self.cancels = cancels
        self.now = 0.0
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.links: dict[int, Link] = {}
        self.reading: dict[RequestKey, tuple[Life, tuple[int, ...]]] = {}
        self.outcomes: dict[RequestKey, str] = {}
        self.failures: list[tuple[RequestKey, str]] = []
        self.offered_on: dict[RequestKey, int] = {}
        self.prompts: dict[RequestKey, int] = {}
        self.prefill = Life("prefill", 1, OfferSide(LEASE_S))
        self.decode = Life("decode", 1, PullSide(LEASE_S))

    def run(self) -> dict[RequestKey, str]:
        for i in range(self.random.randint(1, 7)):
            self.at(self.random.uniform(0, 6), partial(self.place, RequestKey(f"r{i}", 0)))
        for _ in range(3):
            self.at(self.random.uniform(0, 15), lambda: self.noise(self.prefill))
            self.at(self.random.uniform(0, 15), lambda: self.noise(self.decode))
            self.at(self.random.uniform(0, 15), self.long_step)
        for fault in (self.crash, self.crash, self.break_link, self.break_link, self.freeze):
            if self.chance(self.faults):
                self.at(self.random.uniform(0, 12), fault)
        steps = 0
        while self.heap:
            steps += 1
            assert steps < 5000, "something never comes to rest"
            self.now, _, act_now = heapq.heappop(self.heap)
            act_now()
        self.check_rest()
        return self.outcomes

    def check_rest(self) -> None:
        for life in (self.prefill, self.decode):
            life.pool.check()
            assert life.pool.counts().free == NUM_BLOCKS, f"{life.peer} leaked {life.pool.counts()}"
            assert sum(life.machine.counts().values()) == 0
            assert life.machine.deadline() is None
        for link in self.links.values():
            for life in (link.offerer, link.puller):
                assert not (link.carries and link.held[life]), f"{life.peer} renews for ever"
        undecided = self.prompts.keys() - self.outcomes.keys()
        assert not undecided, f"stuck: {undecided}"

    # --- time and chance

    def at(self, delay_s: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.heap, (self.now + delay_s, next(self.numbers), do))

    def soon(self) -> float:
        return self.random.expovariate(4.0)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def arrive(self, life: Life, delay_s: float, do: Callable[[], None]) -> None:
        """Something that a worker's asyncio thread does, if it still lives and when it is not frozen."""

        def when() -> None:
            if self.now < life.frozen_until:
                self.at(life.frozen_until - self.now, when)
            elif life.alive:
                do()

        self.at(delay_s, when)

    def on(
        self, life: Life, delay_s: float, do: Callable[[], None], arrived: Callable[[], None] = lambda: None
    ) -> None:
        """Something that comes into the inbox of a worker's engine thread. arrived: what the asyncio thread
        does when it comes."""

        def post() -> None:
            arrived()
            life.inbox.append(do)
            self.turn(life)

        self.arrive(life, delay_s, post)

    def turn(self, life: Life) -> None:
        """As in engine.loop: all events first, then the tick."""
        busy_until = max(life.in_step_until, life.frozen_until)
        if not life.alive:
            return
        if self.now < busy_until:
            self.at(busy_until - self.now, lambda: self.turn(life))
            return
        events, life.inbox = life.inbox, []
        for do in events:
            do()
        self.apply(life, life.machine.tick(self.now))
        deadline = life.machine.deadline()
        if deadline is not None and deadline != life.wake_at:
            life.wake_at = deadline
            # The small excess keeps rounding from making a deadline that is never quite reached.
            self.at(max(0.0, deadline - self.now) + 1e-6, lambda: self.turn(life))

    # --- the router

    def command(self, life: Life, do: Callable[[], None], arrived: Callable[[], None] = lambda: None) -> None:
        """Over the stream, which keeps its order. arrived: done at once, whatever the engine does."""
        life.last_command = max(self.now + self.soon(), life.last_command + 1e-9)
        self.on(life, life.last_command - self.now, do, arrived)

    def place(self, key: RequestKey) -> None:
        self.prompts[key] = self.random.randint(1, 5)
        prefill, decode = self.prefill, self.decode
        self.command(decode, lambda: self.reserve(decode, prefill, key))
        if not decode.alive:
            self.outcomes[key] = "down"
        if self.chance(self.cancels):
            self.at(self.random.uniform(0, 5), lambda: self.cancel(key, "cancelled"))

    def cancel(self, key: RequestKey, outcome: str) -> None:
        self.outcomes.setdefault(key, outcome)
        prefill, decode = self.prefill, self.decode
        if self.chance(0.9):  # also twice, and to workers that do not know it
            self.command(prefill, lambda: self.cancel_prefill(prefill, key))
        else:
            self.at(1.0, lambda: self.cancel(key, outcome))
        self.command(decode, lambda: self.cancel_decode(decode, key))

    def failed(self, key: RequestKey, why: str) -> None:
        assert self.outcomes.get(key) != "delivered", f"{key} failed after it was delivered"
        if key in self.outcomes:
            return
        self.outcomes[key] = why
        self.at(self.soon(), lambda: self.cancel(key, why))
        if key.attempt == 0:
            self.at(self.soon(), lambda: self.place(RequestKey(key.request_id, 1)))

    # --- the decode worker

    def reserve(self, decode: Life, prefill: Life, key: RequestKey) -> None:
        num_tokens = self.prompts[key]
        num_blocks = decode.pool.num_blocks_for(num_tokens + self.random.randint(1, 4))
        if not decode.pool.can_allocate(num_blocks):
            self.outcomes.setdefault(key, "no blocks")
            return
        blocks = decode.pool.allocate(num_blocks, Holder.TRANSFER)
        prompt_blocks = decode.pool.num_blocks_for(num_tokens)
        self.apply(
            decode,
            decode.machine.reserve(key, prefill.peer, "address", num_tokens, prompt_blocks, blocks, self.now),
        )

    def cancel_decode(self, decode: Life, key: RequestKey) -> None:
        if (blocks := decode.sequences.pop(key, None)) is not None:
            decode.pool.drop(blocks, Holder.SEQUENCE)
        self.apply(decode, decode.machine.cancel(key))

    def connect(self, decode: Life, peer: Peer) -> None:
        prefill = self.prefill
        refused = not prefill.alive or prefill.peer != peer or self.chance(self.faults / 4)
        if refused:
            unreachable = HandoffFailure.PEER_UNREACHABLE
            self.on(
                decode,
                self.soon(),
                lambda: self.apply(decode, decode.machine.link_failed(peer, unreachable, "nobody there")),
            )
            return
        link = Link(next(self.numbers), prefill, decode)
        self.links[link.number] = link

        def up_here() -> None:
            if link.carries:
                link.open[decode] = True
                self.apply(decode, decode.machine.link_up(link.number, peer, self.now))
            else:
                unreachable = HandoffFailure.PEER_UNREACHABLE
                self.apply(decode, decode.machine.link_failed(peer, unreachable, "broke"))

        self.on(
            prefill,
            0.0,
            lambda: self.apply(prefill, prefill.machine.link_up(link.number, decode.peer)),
            lambda: link.open.update({prefill: link.carries}),
        )
        self.on(decode, self.soon(), up_here)

    def fetch(self, decode: Life, fetch: act.Fetch) -> None:
        """The copy, in a thread of its own: half of the blocks at one time, the other half at another."""
        source, offered, key = self.links[fetch.link].offerer, fetch.offered, fetch.offered.key
        half = len(fetch.blocks) // 2
        pairs = list(zip(offered.blocks, fetch.blocks, strict=True))

        def copy(part: list[tuple[int, int]]) -> None:
            if decode.alive:
                for remote, local in part:
                    decode.memory[local] = source.memory[remote]

        def end() -> None:
            copy(pairs[half:])
            self.reading.pop(key, None)
            good = all(
                source.generations[b] == g for b, g in zip(offered.blocks, offered.generations, strict=True)
            )
            good = good and not self.chance(self.faults / 8)

            ended_s = self.now

            def told() -> None:
                if good:
                    self.apply(decode, decode.machine.fetched(key, ended_s))
                else:
                    self.apply(decode, decode.machine.fetch_failed(key, "stale"))

            self.on(decode, self.soon(), told)

        def begin() -> None:
            copy(pairs[:half])
            self.at(self.soon() * self.random.choice([0.2, 1, 1, 10]), end)

        self.reading[key] = (source, offered.blocks)
        self.at(self.soon(), begin)

    def deliver(self, decode: Life, action: act.Deliver) -> None:
        key, num_tokens = action.key, self.prompts[action.key]
        used = action.blocks[: decode.pool.num_blocks_for(num_tokens)]
        assert [decode.memory[b] for b in used] == [(key, i) for i in range(len(used))], (
            "tokens from wrong KV"
        )
        assert action.first_token == num_tokens
        if key not in self.outcomes:
            self.outcomes[key] = "delivered"
        decode.pool.add(action.blocks, Holder.SEQUENCE)
        decode.pool.drop(action.blocks, Holder.TRANSFER)
        decode.sequences[key] = list(action.blocks)

        def finish() -> None:
            if key in decode.sequences:
                assert [decode.memory[b] for b in used] == [(key, i) for i in range(len(used))]
                self.cancel_decode(decode, key)

        self.on(decode, self.random.uniform(0, 3), finish)

    # --- the prefill worker

    def start_prefill(self, prefill: Life, decode: Life, key: RequestKey) -> None:
        prefill.machine.promise(key, decode.peer)
        if key in prefill.cancelled or key in self.outcomes:
            # Refused, as a prompt is that cannot be served.
            self.apply(prefill, prefill.machine.withdraw(key))
            self.outcomes.setdefault(key, "cancelled")
            return
        prefill.sequences[key] = []
        self.compute(prefill, key)

    def compute(self, prefill: Life, key: RequestKey) -> None:
        if key not in prefill.sequences:
            return
        num_blocks = prefill.pool.num_blocks_for(self.prompts[key])
        if not prefill.pool.can_allocate(num_blocks):
            self.on(prefill, 0.5, lambda: self.compute(prefill, key))
            return
        prefill.sequences[key] = prefill.pool.allocate(num_blocks, Holder.SEQUENCE)
        self.on(prefill, self.soon() * self.random.choice([1, 1, 8]), lambda: self.prefilled(prefill, key))

    def prefilled(self, prefill: Life, key: RequestKey) -> None:
        blocks = prefill.sequences.pop(key, None)
        if blocks is None:
            return
        for i, block in enumerate(blocks):
            prefill.memory[block] = (key, i)
        if self.chance(0.1):
            self.outcomes.setdefault(key, "ended with its first token")
            prefill.pool.drop(blocks, Holder.SEQUENCE)
            self.apply(prefill, prefill.machine.withdraw(key))
            return
        prefill.pool.add(blocks, Holder.TRANSFER)
        prefill.pool.drop(blocks, Holder.SEQUENCE)
        generations = [prefill.generations[b] for b in blocks]
        num_tokens = self.prompts[key]
        self.apply(prefill, prefill.machine.offer(key, blocks, generations, num_tokens, num_tokens, self.now))

    def cancel_prefill(self, prefill: Life, key: RequestKey) -> None:
        prefill.cancelled.add(key)
        if (blocks := prefill.sequences.pop(key, None)) is not None:
            prefill.pool.drop(blocks, Holder.SEQUENCE)
        self.apply(prefill, prefill.machine.withdraw(key))

    def freed_by_offerer(self, prefill: Life, key: RequestKey, blocks: tuple[int, ...]) -> None:
        """Guarantee 1: nobody reads what is freed, unless the link it was offered on is closed."""
        source, read = self.reading.get(key, (None, ()))
        if source is prefill and set(read) & set(blocks):
            assert not any(
                link.open[prefill] for link in self.links.values() if link.number == self.offered_on[key]
            ), f"{key} was freed under its reader"

    # --- both

    def noise(self, life: Life) -> None:
        """Another sequence that takes what is free, writes to it, and finds it unchanged when it leaves."""
        if not life.alive:
            return
        num_blocks = self.random.randint(1, 6)
        if not life.pool.can_allocate(num_blocks):
            return
        blocks, tag = life.pool.allocate(num_blocks, Holder.SEQUENCE), object()
        for block in blocks:
            life.memory[block] = tag

        def leave() -> None:
            if life.alive:
                assert all(life.memory[block] is tag for block in blocks), "somebody wrote into our blocks"
                life.pool.drop(blocks, Holder.SEQUENCE)

        self.at(self.soon(), leave)

    def apply(self, life: Life, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case act.Free(key, blocks):
                    if life is self.prefill:
                        self.freed_by_offerer(life, key, blocks)
                    else:
                        assert key not in self.reading or not life.alive, "freed under the copy"
                    life.pool.drop(blocks, Holder.TRANSFER)
                    if self.chance(0.5):
                        self.noise(life)
                case act.Fail(key, reason):
                    self.failures.append((key, reason.value))
                    self.at(self.soon(), partial(self.failed, key, reason.value))
                case act.Connect(peer):
                    self.at(self.soon(), partial(self.connect, life, peer))
                case act.ConfirmReserved(key):
                    prefill = self.prefill
                    self.command(
                        prefill,
                        partial(self.start_prefill, prefill, life, key),
                        partial(self.promised, prefill, life, key),
                    )
                case act.Fetch():
                    self.fetch(life, action)
                case act.Deliver():
                    self.deliver(life, action)
                case act.Fence(number):
                    self.links[number].open[life] = False
                    self.lose(self.links[number], self.soon)
                case _:
                    self.send(life, action)

    def send(self, sender: Life, action: Any) -> None:
        link = self.links[action.link]
        if not link.open[sender] or not link.carries:
            return
        receiver = link.puller if sender is link.offerer else link.offerer
        machine, number = receiver.machine, link.number
        match action:
            case act.SendOffer(_, offered):
                self.offered_on[offered.key] = number
            case act.SendWithdraw(_, key) | act.SendAcknowledge(_, key) | act.SendDrop(_, key):
                link.held[sender].discard(key)

        def receive(arrived_s: float) -> None:
            if not link.open[receiver]:
                return
            match action:
                case act.SendOffer(_, offered):
                    self.apply(receiver, machine.offered(number, offered, arrived_s))
                case act.SendWithdraw(_, key):
                    self.apply(receiver, machine.withdrawn(number, key))
                case act.SendAcknowledge(_, key):
                    self.apply(receiver, machine.acknowledged(number, key))
                case act.SendDrop(_, key):
                    self.apply(receiver, machine.dropped(number, key))
                case Renew(_, keys):
                    machine.renewed(number, keys, arrived_s)

        def arrive() -> None:
            if not link.carries:
                return
            match action:
                case act.SendOffer(_, offered):
                    self.hold(link, receiver, offered.key)
                case act.SendAcknowledge(_, key) | act.SendDrop(_, key):
                    link.held[receiver].discard(key)
            receiver.inbox.append(partial(receive, self.now))
            self.turn(receiver)

        link.last[sender] = max(self.now + self.soon(), link.last[sender] + 1e-9)
        self.arrive(receiver, link.last[sender] - self.now, arrive)

    def promised(self, prefill: Life, decode: Life, key: RequestKey) -> None:
        for link in self.links.values():
            if (link.offerer, link.puller) == (prefill, decode) and link.open[prefill]:
                self.hold(link, prefill, key)

    def hold(self, link: Link, life: Life, key: RequestKey) -> None:
        link.held[life].add(key)
        if not link.beating[life]:
            link.beating[life] = True
            self.arrive(life, self.random.uniform(0, LEASE_S / 4), lambda: self.beat(link, life))

    def beat(self, link: Link, life: Life) -> None:
        """Engine or not, a link says what is held as long as it carries."""
        link.beating[life] = bool(link.held[life]) and link.carries
        if link.beating[life]:
            self.send(life, Renew(link.number, tuple(link.held[life])))
            self.arrive(life, LEASE_S / 4, lambda: self.beat(link, life))

    # --- faults

    def lose(self, link: Link, notice_s: Callable[[], float]) -> None:
        """The link carries nothing any more; each end learns of it in its own time."""
        link.carries = False
        for life in (link.offerer, link.puller):

            def lost(life: Life = life) -> None:
                link.open[life] = False
                self.apply(life, life.machine.link_lost(link.number))

            self.on(life, notice_s(), lost)

    def break_link(self) -> None:
        carrying = [link for link in self.links.values() if link.carries]
        if carrying:
            silent = self.chance(0.3)
            notice = (lambda: self.random.uniform(1, 1.5) * LEASE_S) if silent else self.soon
            self.lose(self.random.choice(carrying), notice)

    def freeze(self) -> None:
        life = self.random.choice([self.prefill, self.decode])
        life.frozen_until = self.now + self.random.choice([1.0, 2.0 * LEASE_S])

    def long_step(self) -> None:
        """Not a fault: a model and a machine may be like that."""
        life = self.random.choice([self.prefill, self.decode])
        life.in_step_until = self.now + self.random.choice([0.5, 1.5, 3.0]) * LEASE_S

    def crash(self) -> None:
        name = self.random.choice(["prefill", "decode"])
        old: Life = getattr(self, name)
        old.alive = False
        new = Life(name, old.peer.epoch + 1, OfferSide(LEASE_S) if name == "prefill" else PullSide(LEASE_S))
        setattr(self, name, new)
        for link in self.links.values():
            if link.carries and old in (link.offerer, link.puller):
                self.lose(link, self.soon)
        # The router's stream breaks: it cancels all that it placed there.
        for key in list(self.prompts):
            if key not in self.outcomes:
                self.at(self.soon(), partial(self.cancel, key, "down"))


@pytest.mark.parametrize("start", range(0, 4000, 1000))
def test_faulty_schedules(start: int) -> None:
    seen: set[str] = set()
    for seed in range(start, start + 1000):
        try:
            seen |= set(Schedule(seed, faults=0.3, cancels=0.3).run().values())
        except Exception as error:
            raise AssertionError(f"schedule {seed}: {error}") from error
    # The schedules do reach what they are meant to try.
    assert seen >= {"delivered", "cancelled", "down", "no blocks", *(f.value for f in HandoffFailure)} - {
        "peer_mismatch"
    }


@pytest.mark.parametrize("cancels", [0.0, 0.5])
def test_without_faults_nothing_fails(cancels: float) -> None:
    good = {"delivered", "no blocks", "ended with its first token"} | ({"cancelled"} if cancels else set())
    for seed in range(500):
        schedule = Schedule(seed, faults=0.0, cancels=cancels)
        outcomes = set(schedule.run().values())
        assert outcomes <= good, (seed, outcomes)
        assert schedule.failures == [], seed
