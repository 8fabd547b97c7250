"""What simulated workers stand on: virtual time and chance, engines that are in steps, links, prefix caches.

A link that lives loses nothing and keeps its order, as gRPC's streams do (TCP): messages are lost by its
death alone. What travels over different streams, also between the same two processes, overtakes each other
freely.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from engine.block_pool import BlockPool, Holder
from engine.sequence import RequestKey
from transfer.handoff import Peer

LEASE_S = 4.0
NUM_BLOCKS = 16
BLOCK_SIZE = 2
NUM_LAYERS = 3
MAX_DELAY_S = 0.9
MAX_EVENTS = 20_000

Tag: TypeAlias = tuple[object, int]
"""Whose tokens a block holds, and the how many-th block of them it is."""


class Timeline:
    """Virtual time and chance of one schedule.

    faults: how likely each thing goes wrong. moved_s: when anything but a sign of life last happened.
    seen: which event has found which state of the machines.
    """

    def __init__(self, seed: int, faults: float) -> None:
        self.random = random.Random(seed)
        self.faults = faults
        self.now = 0.0
        self.moved_s = 0.0
        self.seen: set[tuple[str, str]] = set()
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_events = 0

    def run(self) -> None:
        heap = self._heap
        while heap:
            assert self._num_events < MAX_EVENTS, "something never comes to rest"
            self.now, _, do, args = heapq.heappop(heap)
            do(*args)

    def at(self, time_s: float, do: Callable[..., None], *args: Any) -> None:
        self._num_events += 1
        heapq.heappush(self._heap, (time_s, self._num_events, do, args))

    def after(self, delay_s: float, do: Callable[..., None], *args: Any) -> None:
        self.at(self.now + delay_s, do, *args)

    def moved(self) -> None:
        self.moved_s = max(self.moved_s, self.now)

    def moves_until(self, time_s: float) -> None:
        self.moved_s = max(self.moved_s, time_s)

    def delay(self) -> float:
        """Of a message, in seconds."""
        return min(self.random.expovariate(4.0), MAX_DELAY_S)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability


class Worker:
    """One life of one worker: its blocks and what they hold, its engine thread and its asyncio thread.

    memory: [num_blocks][num_layers]. machine: its half of the hand-off.
    """

    def __init__(self, time: Timeline, peer: Peer, machine: Any) -> None:
        self.time = time
        self.peer = peer
        self.machine = machine
        self.generations = [0] * NUM_BLOCKS
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE, self.generations)
        self.cache = Cache(self.pool)
        self.memory: list[list[object]] = [[None] * NUM_LAYERS for _ in range(NUM_BLOCKS)]
        self.links: dict[int, Link] = {}
        self.alive = True
        # In a step events wait. Frozen, the process does nothing at all, and its links are silent.
        self.in_step_until = 0.0
        self.frozen_until = 0.0
        self._inbox: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._stopped: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._turn_at = -1.0
        self._wake_at: float | None = None
        self._last_command_s = 0.0

    def apply(self, actions: Sequence[Any]) -> None:
        """Do what the machine asks for."""
        raise NotImplementedError

    def receive(self, link: Link, kind: str, key: RequestKey, payload: Any, arrived_s: float) -> None:
        """The engine thread takes a message of a link."""
        raise NotImplementedError

    def received(self, link: Link, kind: str, key: RequestKey, payload: Any) -> None:
        """The asyncio thread passes it on."""
        raise NotImplementedError

    def link_lost(self, link: Link) -> None:
        """The engine thread hears that a link is over."""
        raise NotImplementedError

    def router_gone(self) -> None:
        """The engine thread hears that the router is: all it placed here is given up."""
        raise NotImplementedError

    def command(self, do: Callable[..., None], *args: Any) -> None:
        """The router's stream, which keeps its order: `do` in the asyncio thread."""
        self._last_command_s = max(self.time.now + self.time.delay(), self._last_command_s + 1e-9)
        self.time.moves_until(self._last_command_s)
        self.time.at(self._last_command_s, self.arrive, do, *args)

    def arrive(self, do: Callable[..., None], *args: Any) -> None:
        """Any thread but the engine's does something, if it lives, and when it is not frozen."""
        if self.time.now < self.frozen_until or self._stopped:
            if not self._stopped:
                self.time.at(self.frozen_until, self._thaw)
            self._stopped.append((do, args))
        elif self.alive:
            do(*args)

    def _thaw(self) -> None:
        if self.time.now < self.frozen_until:
            self.time.at(self.frozen_until, self._thaw)
            return
        stopped, self._stopped = self._stopped, []
        for do, args in stopped:
            self.arrive(do, *args)

    def post(self, do: Callable[..., None], *args: Any) -> None:
        """Something for the engine thread."""
        self._inbox.append((do, args))
        self.turn()

    def turn(self) -> None:
        """As in engine.loop: all events first, then the tick."""
        if not self.alive:
            return
        busy_until = max(self.in_step_until, self.frozen_until)
        now = self.time.now
        if now < busy_until:
            if self._turn_at != busy_until:
                self._turn_at = busy_until
                self.time.at(busy_until, self.turn)
            return
        events, self._inbox = self._inbox, []
        for do, args in events:
            do(*args)
        deadline = self.machine.deadline()
        if deadline is not None and deadline <= now:
            for entry in self.machine._entries.values():
                if entry.lease_end_s <= now and entry.state.value not in ("promised", "recalled"):
                    self.time.seen.add((entry.state.value, "lease end"))
            self.apply(self.machine.tick(now))
            deadline = self.machine.deadline()
        if deadline is not None and (self._wake_at is None or deadline < self._wake_at):
            self._wake_at = deadline
            self.time.at(deadline, self._wake)

    def _wake(self) -> None:
        self._wake_at = None
        self.turn()

    def see(self, event: str, key: RequestKey) -> None:
        entry = self.machine._entries.get(key)
        self.time.seen.add((entry.state.value if entry else "gone", event))

    def see_all(self, event: str, peer: Peer) -> None:
        for entry in self.machine._entries.values():
            if entry.peer == peer:
                self.time.seen.add((entry.state.value, event))

    def freeing(self) -> None:
        """No block is kept for longer than a lease after the last thing that happened."""
        late_s = self.time.now - max(self.time.moved_s, self.in_step_until, self.frozen_until)
        assert late_s <= LEASE_S + 1, f"{self.peer} kept blocks for {late_s} s though nothing happened"
        if self.time.chance(0.5):
            self.noise()

    def noise(self) -> None:
        """Another sequence takes what is free, writes to it, and finds it unchanged when it leaves."""
        num_blocks = self.time.random.randint(1, 8)
        if self.alive and self.pool.can_allocate(num_blocks):
            blocks, tag = self.pool.allocate(num_blocks, Holder.SEQUENCE), object()
            for block in blocks:
                self.memory[block] = [tag] * NUM_LAYERS
            self.time.after(self.time.delay(), self._silence, blocks, tag)

    def _silence(self, blocks: list[int], tag: object) -> None:
        if self.alive:
            for block in blocks:
                assert self.memory[block] == [tag] * NUM_LAYERS, "somebody wrote into another's blocks"
            self.pool.drop(blocks, Holder.SEQUENCE)

    def check_rest(self) -> None:
        """Nothing is left of any hand-off."""
        self.pool.check()
        counts = self.pool.counts()
        assert counts.available == NUM_BLOCKS, f"{self.peer} leaked: {counts}"
        assert not sum(self.machine.counts().values()), f"{self.peer} keeps entries"
        assert self.machine.deadline() is None
        for link in self.links.values():
            assert not link.open[self], f"{self.peer} keeps {link.number} open"


class Cache:
    """A prefix cache: tags of full blocks."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._blocks: dict[Tag, int] = {}
        self._tags: dict[int, Tag] = {}
        pool.tell(self._forget)

    def match(self, tags: Sequence[Tag]) -> list[int]:
        """The blocks of the longest beginning that is here."""
        found: list[int] = []
        for tag in tags:
            if tag not in self._blocks:
                break
            found.append(self._blocks[tag])
        return found

    def insert(self, tags: Sequence[Tag], blocks: Sequence[int]) -> None:
        for tag, block in zip(tags, blocks, strict=False):
            if tag not in self._blocks:
                self._blocks[tag], self._tags[block] = block, tag
                self._pool.add([block], Holder.CACHE)

    def _forget(self, block: int) -> None:
        del self._blocks[self._tags.pop(block)]


class Link:
    """Both ends of a link, as link.LinkEnd.

    open: whether an end takes and sends messages. carries: False when messages have ceased to get through.
    held: what each end says that it holds (an ordered set, for a schedule must be the same each time).
    """

    def __init__(self, time: Timeline, number: int, offerer: Worker, puller: Worker) -> None:
        self.number = number
        self.offerer = offerer
        self.puller = puller
        self.carries = True
        self.open = {offerer: False, puller: False}
        self.held: dict[Worker, dict[RequestKey, None]] = {offerer: {}, puller: {}}
        self._time = time
        self._swallows = False
        self._last_s = {offerer: 0.0, puller: 0.0}
        self._beats = {offerer: False, puller: False}

    def other(self, worker: Worker) -> Worker:
        return self.puller if worker is self.offerer else self.offerer

    def send(self, sender: Worker, kind: str, key: RequestKey | None, payload: Any = None) -> None:
        """To nobody, if the end is closed."""
        if self.open[sender] and self.carries:
            self._last_s[sender] = max(self._time.now + self._time.delay(), self._last_s[sender] + 1e-9)
            receiver = self.other(sender)
            self._time.at(self._last_s[sender], receiver.arrive, self._receive, receiver, kind, key, payload)

    def _receive(self, receiver: Worker, kind: str, key: RequestKey, payload: Any) -> None:
        if self.open[receiver] and not self._swallows:
            if kind != "renew":
                self._time.moved()
            receiver.received(self, kind, key, payload)

    def hold(self, worker: Worker, key: RequestKey) -> None:
        """Engine or not, a link says what is held for as long as it carries."""
        self.held[worker][key] = None
        if not self._beats[worker]:
            self._beats[worker] = True
            self._time.after(self._time.random.uniform(0, LEASE_S / 4), worker.arrive, self._beat, worker)

    def release(self, worker: Worker, key: RequestKey) -> None:
        self.held[worker].pop(key, None)

    def _beat(self, worker: Worker) -> None:
        self._beats[worker] = bool(self.held[worker]) and self.carries and self.open[worker]
        if self._beats[worker]:
            self.send(worker, "renew", None, tuple(self.held[worker]))
            self._time.after(LEASE_S / 4, worker.arrive, self._beat, worker)

    def close(self, worker: Worker) -> None:
        """This end closes it; the other learns of it."""
        if self.open[worker]:
            self.end(worker)
            self.lose(self._time.delay, swallows=self._time.chance(0.5))

    def lose(self, notice_s: Callable[[], float], *, swallows: bool) -> None:
        """It carries nothing from now on; each end learns of it in its own time.

        swallows: what is on its way is lost as well; else it arrives first.
        """
        self._swallows = self._swallows or swallows
        if not self.carries:
            return
        self.carries = False
        self._time.moved()
        for worker in (self.offerer, self.puller):
            at_s = max(self._time.now + notice_s(), self._last_s[self.other(worker)] + 1e-9)
            self._time.moves_until(at_s)
            self._time.at(at_s, worker.arrive, self.end, worker)

    def end(self, worker: Worker) -> None:
        """As one end notices that it is over."""
        if self.open[worker]:
            self.open[worker] = False
            self.held[worker].clear()
            self._time.after(0.0, worker.arrive, worker.post, worker.link_lost, self)
