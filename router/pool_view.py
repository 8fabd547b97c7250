"""What the router knows about the load of every worker: its own ledger on top of the snapshots that workers
push.

A request is credited to a worker at the moment it is placed there. The command that tells the worker has a
number, and a snapshot says up to which number the worker has taken commands into account: then the credit is
part of the snapshot's figures and is no longer added to them. What ended since the snapshot is taken off
again. So neither a stale snapshot nor a command under way sends a herd of requests to one worker. A core: no
clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from engine.reservation import has_room, reserved_blocks
from engine.sequence import RequestKey
from router.pair_table import PairTable


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


@dataclass(frozen=True, slots=True)
class WorkerCapacity:
    """What a worker said about itself in its hello."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_batch_tokens: int

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
    """One snapshot. queue_tokens: prompt tokens not yet computed. requests: running and queued ones."""

    commands_seen: int
    requests: int
    queue_tokens: int
    free_blocks: int


@dataclass(slots=True)
class _Credit:
    tokens: int
    blocks: int
    command: int | None  # None until the command that tells the worker is sent
    seen: bool = False


@dataclass(slots=True)
class _Sum:
    requests: int = 0
    tokens: int = 0
    blocks: int = 0

    def add(self, credit: _Credit, sign: int = 1) -> None:
        self.requests += sign
        self.tokens += sign * credit.tokens
        self.blocks += sign * credit.blocks


class WorkerView:
    """One life of one worker, as far as placement is concerned."""

    def __init__(self, worker_id: str, epoch: int, role: Role, capacity: WorkerCapacity) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.role = role
        self.capacity = capacity
        self.up = True
        # No sign of life for a while: nothing new goes there, and nothing is taken away.
        self.suspected = False
        self._load = Load(commands_seen=0, requests=0, queue_tokens=0, free_blocks=capacity.num_blocks)
        self._credits: dict[RequestKey, _Credit] = {}
        self._unseen = _Sum()
        self._ended = _Sum()
        self._refused = False

    @property
    def live_requests(self) -> int:
        """Requests that this router has there."""
        return len(self._credits)

    @property
    def requests(self) -> int:
        """Requests there, other routers' included: what a new one shares the worker with."""
        estimate = self._load.requests - self._ended.requests + self._unseen.requests
        return max(self.live_requests, estimate)

    @property
    def outstanding_tokens(self) -> int:
        """Prompt tokens that a new prompt waits for."""
        return max(0, self._load.queue_tokens - self._ended.tokens) + self._unseen.tokens

    @property
    def free_blocks(self) -> int:
        """KV blocks that a new request may count on; 0 after a refusal, until the next snapshot."""
        if self._refused:
            return 0
        known = min(self.capacity.num_blocks, self._load.free_blocks + self._ended.blocks)
        return max(0, known - self._unseen.blocks)

    @property
    def refused(self) -> bool:
        """Whether the worker had no room, and has not said since that it has."""
        return self._refused

    def has_room_for(self, num_blocks: int) -> bool:
        """Whether a decode worker accepts a new request that reserves so many blocks."""
        return has_room(num_blocks, self.free_blocks, self.requests)

    def credit(self, key: RequestKey, tokens: int, blocks: int) -> None:
        """`key` is placed here."""
        credit = _Credit(tokens, blocks, command=None)
        self._credits[key] = credit
        self._unseen.add(credit)

    def sent(self, key: RequestKey, command: int) -> None:
        """Command number `command` tells the worker about `key`."""
        self._credits[key].command = command

    def release(self, key: RequestKey) -> None:
        """`key` no longer loads the worker; one that is not here is ignored."""
        credit = self._credits.pop(key, None)
        if credit is None:
            return
        if credit.seen:
            self._ended.add(credit)
        else:
            self._unseen.add(credit, sign=-1)

    def refuse(self) -> None:
        """The worker had no room, whatever the figures say: believe it until its next snapshot."""
        self._refused = True

    def snapshot(self, load: Load) -> None:
        """The worker's own figures."""
        self._load = load
        self._ended = _Sum()
        self._refused = False
        for credit in self._credits.values():
            if not credit.seen and credit.command is not None and credit.command <= load.commands_seen:
                credit.seen = True
                self._unseen.add(credit, sign=-1)


class PoolView:
    """All registered workers, of both roles. pairs: which of them are linked."""

    def __init__(self) -> None:
        self.pairs = PairTable()
        self._workers: dict[str, WorkerView] = {}

    def add(self, worker: WorkerView) -> None:
        """A new life of a worker takes the place of its earlier one."""
        self.pairs.forget(worker.worker_id)
        self._workers[worker.worker_id] = worker

    def down(self, worker_id: str) -> None:
        """The worker is gone, though it may come back."""
        self.pairs.forget(worker_id)
        self._workers[worker_id].up = False

    def remove(self, worker_id: str) -> None:
        """The worker is no longer part of the deployment."""
        self.pairs.forget(worker_id)
        del self._workers[worker_id]

    def __getitem__(self, worker_id: str) -> WorkerView:
        return self._workers[worker_id]

    def __iter__(self) -> Iterator[WorkerView]:
        return iter(self._workers.values())

    def get(self, worker_id: str) -> WorkerView | None:
        """The worker, if it is registered."""
        return self._workers.get(worker_id)

    def up(self, role: Role) -> list[WorkerView]:
        """Workers of the role that are not known to be gone."""
        return [worker for worker in self._workers.values() if worker.up and worker.role is role]

    def placeable(self, role: Role) -> list[WorkerView]:
        """Of these, the ones that new requests go to: those that are not suspected."""
        return [worker for worker in self.up(role) if not worker.suspected]

    def why_no_pair(self) -> tuple[bool, str] | None:
        """`PairTable.why_none` of the workers that are up; there must be some of both roles."""
        prefills, decodes = (
            {worker.worker_id: None for worker in self.up(role)} for role in (Role.PREFILL, Role.DECODE)
        )
        return self.pairs.why_none(prefills, decodes)

    def missing_role(self) -> Role | None:
        """A role that has no worker that is up."""
        return next((role for role in (Role.PREFILL, Role.DECODE) if not self.up(role)), None)

    def largest_decode_tokens(self) -> int | None:
        """Tokens that the roomiest decode worker can hold; None when none is up."""
        return max((worker.capacity.num_tokens for worker in self.up(Role.DECODE)), default=None)
