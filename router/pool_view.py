"""What the router knows about the load of every worker: its own ledgers on top of the snapshots that workers
push.

Snapshots are numbered. One that is not newer than the last is ignored; one that is missing is not missed, as
each says all there is. While none comes the ledgers go on alone: what is placed is added, what ends is taken
off, prompts are read at the pace that the worker is known for. What other routers do meanwhile is not seen;
after a while the worker is suspected, and gets nothing new.

    ledger.py        requests, prompt tokens and blocks, for room
    read_ledger.py   how long the prompts take that a worker has
    write_ledger.py  who will decode there at a time to come

Cores: no clock, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from engine.latency import LatencyModel, OnlineLatency, StepShape
from engine.reservation import has_room, reserved_blocks
from engine.sequence import RequestKey
from router.ledger import Ledger
from router.pair_table import PairTable
from router.placed_work import PlacedWork
from router.read_ledger import ReadLedger
from router.write_ledger import Batch, WriteLedger

_USUAL_CHUNK = 512


class Role(StrEnum):
    """What a worker does."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"

    @property
    def writes(self) -> bool:
        """Whether such a worker writes answers."""
        return self is not Role.PREFILL

    @property
    def reads(self) -> bool:
        """Whether such a worker reads prompts."""
        return self is not Role.DECODE


READERS = tuple(role for role in Role if role.reads)
WRITERS = tuple(role for role in Role if role.writes)


@dataclass(frozen=True, slots=True)
class WorkerCapacity:
    """What a worker said about itself in its hello. fingerprint: of its model, with which the digests of its
    prefix cache begin."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_batch_tokens: int
    fingerprint: str = ""

    @property
    def num_tokens(self) -> int:
        """Positions that all blocks together hold."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """KV blocks that `num_tokens` positions take."""
        return -(-num_tokens // self.block_size)

    def reserved_blocks(self, num_tokens: int, tokens_left: int) -> int:
        """KV blocks that a decode worker sets aside for a request of `num_tokens`, of which at most
        `tokens_left` more will come."""
        return reserved_blocks(self.block_size, num_tokens, tokens_left)


@dataclass(frozen=True, slots=True)
class Load:
    """One snapshot. requests: running and queued ones. queue_tokens: prompt tokens not yet computed. seq: its
    number, 0 if it has none. decoding_requests: of `requests`, those that decode; decode_context: tokens of
    context that they have together. least_tpot_s: the tightest of what they can still afford for each token
    to come; 0 if the worker knows of no limit. ahead_s: how far that one is ahead of its limit."""

    commands_seen: int
    requests: int
    queue_tokens: int
    free_blocks: int
    seq: int = 0
    decoding_requests: int = 0
    decode_context: int = 0
    least_tpot_s: float = 0.0
    ahead_s: float = 0.0


class WorkerView:
    """One life of one worker, as far as placement is concerned."""

    def __init__(
        self,
        worker_id: str,
        epoch: int,
        role: Role,
        capacity: WorkerCapacity,
        model: LatencyModel | None = None,
    ) -> None:
        """model: how long its steps take, as measured when it started; None if it has not said so."""
        self.worker_id = worker_id
        self.epoch = epoch
        self.role = role
        self.capacity = capacity
        self.latency = OnlineLatency(LatencyModel.unknown() if model is None else model)
        self.reading = ReadLedger()
        self.writing = WriteLedger()
        self._up = True
        self._suspected = False
        self._draining = False
        self._load = Load(commands_seen=0, requests=0, queue_tokens=0, free_blocks=capacity.num_blocks)
        self._ledger = Ledger()
        self._refused = False
        self._reading_step_s = math.inf
        self._on_change: Callable[[], None] | None = None

    def tell(self, on_change: Callable[[], None]) -> None:
        """on_change: called when `up`, `suspected` or `draining` changes."""
        self._on_change = on_change

    @property
    def up(self) -> bool:
        """Whether it is not known to be gone."""
        return self._up

    @up.setter
    def up(self, up: bool) -> None:
        self._up = up
        self._changed()

    @property
    def suspected(self) -> bool:
        """No sign of life for a while: nothing new goes there, and nothing is taken away."""
        return self._suspected

    @suspected.setter
    def suspected(self, suspected: bool) -> None:
        self._suspected = suspected
        self._changed()

    @property
    def draining(self) -> bool:
        """Somebody wants it empty: nothing new goes there, and what is there ends there."""
        return self._draining

    @draining.setter
    def draining(self, draining: bool) -> None:
        self._draining = draining
        self._changed()

    @property
    def takes_new(self) -> bool:
        """Whether new requests may go there."""
        return self._up and not self._suspected and not self._draining

    @property
    def live_requests(self) -> int:
        """Requests that this router has there."""
        return len(self._ledger)

    @property
    def requests(self) -> int:
        """Requests there, other routers' included: what a new one shares the worker with."""
        ledger = self._ledger
        estimate = self._load.requests - ledger.ended.requests + ledger.unseen.requests
        return max(len(ledger), estimate)

    @property
    def outstanding_tokens(self) -> int:
        """Prompt tokens that a new prompt waits for."""
        ledger = self._ledger
        return max(0, self._load.queue_tokens - ledger.ended.tokens) + ledger.unseen.tokens

    @property
    def free_blocks(self) -> int:
        """KV blocks that a new request may count on; 0 after a refusal, until the next snapshot."""
        if self._refused:
            return 0
        ledger = self._ledger
        known = min(self.capacity.num_blocks, self._load.free_blocks + ledger.ended.blocks)
        return max(0, known - ledger.unseen.blocks)

    @property
    def refused(self) -> bool:
        """Whether the worker had no room, and has not said since that it has."""
        return self._refused

    def has_room_for(self, num_blocks: int) -> bool:
        """Whether a decode worker accepts a new request that reserves so many blocks."""
        return has_room(num_blocks, self.free_blocks, self.requests)

    def credit(self, key: RequestKey, tokens: int, blocks: int, *, placed: PlacedWork | None = None) -> None:
        """`key` is placed here. tokens: of its prompt, if it is read here. blocks: that are reserved, if its
        answer is written here. placed: for estimates; without it only room is counted."""
        self._ledger.credit(key, tokens, blocks)
        if placed is None:
            return
        if tokens > 0:
            self.reading.add(key, tokens, placed.read_s, placed.priority, placed.deadline, placed.at)
        if self.role.writes:
            self.writing.add(key, placed)

    def sent(self, key: RequestKey, command: int) -> None:
        """Command number `command` tells the worker about `key`."""
        self._ledger.sent(key, command)

    def emitted(self, key: RequestKey, num_tokens: int) -> None:
        """Tokens of `key` came, whoever drew them: to be told of who writes the answer. With the first of
        them its prompt is read, wherever that was. One that is not here is ignored."""
        self._ledger.read(key)
        self.reading.remove(key)
        self.writing.emitted(key, num_tokens)

    def release(self, key: RequestKey) -> None:
        """`key` no longer loads the worker; one that is not here is ignored."""
        self._ledger.release(key)
        self.reading.remove(key)
        self.writing.remove(key)

    def refuse(self) -> None:
        """The worker had no room, whatever the figures say: believe it until its next snapshot."""
        self._refused = True

    def observe(self, shape: StepShape, seconds: float) -> None:
        """A step of the worker, and how long it took."""
        self.latency.observe(shape, seconds)
        if shape.prefill:
            self._reading_step_s = seconds

    def snapshot(self, load: Load, now: float) -> None:
        """The worker's own figures; ignored if they are older than those that are known."""
        if 0 < load.seq <= self._load.seq:
            return
        self._load = load
        self._refused = False
        seen = self._ledger.snapshot(load.commands_seen)
        token_s = self.latency.corrected_s(self.latency.model.prefill_s(_USUAL_CHUNK)) / _USUAL_CHUNK
        self.reading.snapshot(load.queue_tokens, seen, token_s, self._reading_step_s, now)
        batch = Batch(load.decoding_requests, load.decode_context)
        self.writing.snapshot(batch, load.least_tpot_s, load.ahead_s)

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change()


class PoolView:
    """All registered workers. pairs: which of them are linked.

    Questions that concern the pool as a whole are asked with every request, so their answers are kept until
    a worker comes, goes, is suspected or drained, or a link changes: they cost the same with a thousand
    workers.
    """

    def __init__(self) -> None:
        self.pairs = PairTable()
        self._workers: dict[str, WorkerView] = {}
        self._version = 0
        self._up: dict[tuple[Role, ...], tuple[WorkerView, ...]] = {}
        self._placeable: dict[tuple[Role, ...], tuple[WorkerView, ...]] = {}
        self._no_pair: tuple[int, tuple[bool, str] | None] | None = None
        self._largest_tokens: int | None = None

    @property
    def version(self) -> int:
        """Another one after each change of who is up, suspected or drained."""
        return self._version

    def add(self, worker: WorkerView) -> None:
        """A new life of a worker takes the place of its earlier one."""
        self.pairs.forget(worker.worker_id)
        self._workers[worker.worker_id] = worker
        worker.tell(self._changed)
        self._changed()

    def down(self, worker_id: str) -> None:
        """The worker is gone, though it may come back."""
        self.pairs.forget(worker_id)
        self._workers[worker_id].up = False

    def change_role(self, worker_id: str, role: Role) -> None:
        """A decode worker is mixed from now on, or the other way round: it keeps what it has."""
        self._workers[worker_id].role = role
        self._changed()

    def remove(self, worker_id: str) -> None:
        """The worker is no longer part of the deployment."""
        self.pairs.forget(worker_id)
        del self._workers[worker_id]
        self._changed()

    def __getitem__(self, worker_id: str) -> WorkerView:
        return self._workers[worker_id]

    def __iter__(self) -> Iterator[WorkerView]:
        return iter(self._workers.values())

    def get(self, worker_id: str) -> WorkerView | None:
        """The worker, if it is registered."""
        return self._workers.get(worker_id)

    def up(self, *roles: Role) -> Sequence[WorkerView]:
        """Workers of these roles that are not known to be gone."""
        known = self._up.get(roles)
        if known is None:
            known = tuple(worker for worker in self if worker.up and worker.role in roles)
            self._up[roles] = known
        return known

    def placeable(self, *roles: Role) -> Sequence[WorkerView]:
        """Of these, the ones that new requests go to."""
        known = self._placeable.get(roles)
        if known is None:
            known = tuple(worker for worker in self.up(*roles) if worker.takes_new)
            self._placeable[roles] = known
        return known

    def why_no_pair(self) -> tuple[bool, str] | None:
        """None while a mixed worker is up, or two workers are linked that are; else `PairTable.why_none`. No
        role must be missing."""
        if self.up(Role.MIXED):
            return None
        if self._no_pair is None or self._no_pair[0] != self.pairs.version:
            prefills, writers = (
                {worker.worker_id: None for worker in self.up(*roles)} for roles in ((Role.PREFILL,), WRITERS)
            )
            self._no_pair = self.pairs.version, self.pairs.why_none(prefills, writers)
        return self._no_pair[1]

    def missing_role(self) -> Role | None:
        """A role without which no request can be served: one needs a mixed worker that is up, or one of each
        of the others."""
        if self.up(Role.MIXED):
            return None
        return next((role for role in (Role.PREFILL, Role.DECODE) if not self.up(role)), None)

    def largest_decode_tokens(self) -> int | None:
        """Tokens that the roomiest worker that writes can hold; None when none is up."""
        if self._largest_tokens is None:
            writers = self.up(*WRITERS)
            self._largest_tokens = max((worker.capacity.num_tokens for worker in writers), default=None)
        return self._largest_tokens

    def _changed(self) -> None:
        self._version += 1
        self._up.clear()
        self._placeable.clear()
        self._no_pair = self._largest_tokens = None
