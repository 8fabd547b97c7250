"""How long a decision takes with so many workers in view: the router's cores in this process, no sockets.

Half of the workers read prompts, half write answers; all are loaded as in a busy cluster: prompts that wait,
batches that decode, steps that were reported, prefixes that are cached. A decision is one look at the gate
and the placement of who is next; a turn is all that happens in the router when a request comes: admission,
the round of the gate, ledgers, the command to the worker. Times are CPU time: what others do on this machine
does not count.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from prelay.v1 import worker_pb2
from prometheus_client import CollectorRegistry

from bench.router_workers import BLOCK_SIZE, NUM_BLOCKS, worker_info
from engine.prefix_digests import prefix_digests, short
from engine.sequence import TokenSampling
from router import garbage
from router.dispatch import Dispatcher
from router.estimates import Estimates
from router.gate.base import GateQueue
from router.lengths import OutputLengths
from router.limits import Limits
from router.metrics import RouterMetrics
from router.pair_table import LinkState, Pair, PairLink
from router.placement.base import Decision, Placement
from router.policies import POLICIES, PolicyInputs
from router.pool_view import PoolView, Role
from router.prefix_index import PrefixIndex
from router.recovery import Recovery, RetryBudget
from router.requests import Request
from router.slo import Slo, SloClass, SloLimits
from router.tenants import Tenants
from router.worker_link import ROLE_OF_PROTO

_LATENCY = {"step": 0.01, "rows": 5e-5, "decode_sequences": 1e-5, "decode_context": 1e-8}
_PROMPT_TOKENS = 1024
_READ_S = _LATENCY["step"] + _LATENCY["rows"] * _PROMPT_TOKENS
_LOAD = 0.7  # of what the readers could do
_BATCH = 32  # answers that each writer has, in the mean
_MOST_LIVE = 4096  # however many workers there are
_PREFIXES = 64
_PREFIXES_HELD = 8
_PREFIX_TOKENS = 512
_MAX_TOKENS = 256
_WARM_UP = 0.2  # of the decisions, not counted


@dataclass(frozen=True, slots=True)
class DecisionTimes:
    """Milliseconds."""

    decision_p50: float
    decision_p99: float
    turn_p50: float
    turn_p99: float


def measure(num_workers: int, num_decisions: int, seed: int) -> DecisionTimes:
    """So many workers, half of each role."""
    thresholds = gc.get_threshold()
    try:
        return asyncio.run(_measure(num_workers, num_decisions, seed))
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


async def _measure(num_workers: int, num_decisions: int, seed: int) -> DecisionTimes:
    cluster = BusyCluster(num_workers, random.Random(seed))
    warm_up = max(int(_WARM_UP * num_decisions), cluster.most_live)
    decisions: list[float] = []
    turns: list[float] = []
    garbage.settle()  # as the router's process does
    for _ in range(warm_up + num_decisions):
        request = cluster.next_request()
        cluster.watch.seconds = 0.0
        began = time.thread_time()
        cluster.submit(request)
        turns.append(time.thread_time() - began)
        decisions.append(cluster.watch.seconds)
        cluster.go_on()
        await asyncio.sleep(0)  # the router's own timers
    cluster.close()
    decision = np.percentile(decisions[warm_up:], (50, 99)) * 1e3
    turn = np.percentile(turns[warm_up:], (50, 99)) * 1e3
    return DecisionTimes(float(decision[0]), float(decision[1]), float(turn[0]), float(turn[1]))


class _Watch:
    """seconds: that were spent in what it is put around."""

    def __init__(self) -> None:
        self.seconds = 0.0


class _TimedGate:
    """A gate whose `next` is timed."""

    def __init__(self, gate: GateQueue, watch: _Watch) -> None:
        self._gate, self._watch = gate, watch

    def add(self, request: Request) -> None:
        self._gate.add(request)

    def remove(self, request_id: str) -> None:
        self._gate.remove(request_id)

    def placed(self, request_id: str) -> None:
        self._gate.placed(request_id)

    def next(self, now: float) -> Sequence[Request]:
        began = time.thread_time()
        found = list(self._gate.next(now))
        self._watch.seconds += time.thread_time() - began
        return found

    def __len__(self) -> int:
        return len(self._gate)


class _TimedPlacement:
    """A placement whose `choose` is timed."""

    def __init__(self, placement: Placement, watch: _Watch) -> None:
        self._placement, self._watch = placement, watch

    def choose(self, request: Request, avoid: Collection[str], now: float) -> Decision | None:
        began = time.thread_time()
        decision = self._placement.choose(request, avoid, now)
        self._watch.seconds += time.thread_time() - began
        return decision


_Out = list[tuple["_Link", worker_pb2.RouterMessage]]


class _Link:
    """A worker that takes commands and says nothing by itself."""

    def __init__(self, info: worker_pb2.WorkerInfo, out: _Out) -> None:
        """out: where commands go."""
        self.worker_id = info.worker_id
        self.epoch = info.epoch
        self.role: Role = ROLE_OF_PROTO[info.role]
        self.info = info
        self.last_seq = 1
        self.has: dict[str, _Live] = {}
        self._out = out

    def send(self, message: worker_pb2.RouterMessage) -> int:
        self.last_seq += 1
        self._out.append((self, message))
        return self.last_seq


class _NoText:
    """Stands in for a detokenizer."""

    def push(self, token_id: int) -> str:
        return "x"

    def flush(self) -> str:
        return ""


@dataclass(slots=True)
class _Live:
    """reader: once it was told to read the prompt. num_tokens: of the answer, so far."""

    writer: _Link
    reader: _Link | None = None
    num_tokens: int = 0


class BusyCluster:
    """A dispatcher with the goodput policy, and workers that answer it as time goes by: prompts are read
    after the time that this takes, writers take a step in turn, and the oldest answer ends when there are
    enough."""

    def __init__(self, num_workers: int, rng: random.Random) -> None:
        self.watch = _Watch()
        self._rng = rng
        self._now = 1000.0
        self._number = 0
        self._out: _Out = []
        self._live: dict[str, _Live] = {}
        self._unread: deque[tuple[float, str]] = deque()  # when each prompt is read
        self._links = {
            role: [self._link(role, index) for index in range(num_workers // 2)]
            for role in (worker_pb2.ROLE_PREFILL, worker_pb2.ROLE_DECODE)
        }
        self._readers = self._links[worker_pb2.ROLE_PREFILL]
        self._writers = self._links[worker_pb2.ROLE_DECODE]
        self.most_live = min(_MOST_LIVE, _BATCH * len(self._writers))
        self._prefixes = [self._tokens(_PREFIX_TOKENS) for _ in range(_PREFIXES)]
        self.pool = PoolView()
        self._dispatcher = self._make_dispatcher()
        for link in (*self._readers, *self._writers):
            self._dispatcher.worker_up(link)
        self._answer_commands()
        for link in self._readers:
            self._say(link, blocks=self._cached(link))

    def close(self) -> None:
        self._dispatcher.close()

    def next_request(self) -> Request:
        """Half of them begin like others did."""
        self._number += 1
        self._now += _READ_S / (_LOAD * len(self._readers))
        prefix = self._rng.choice(self._prefixes) if self._rng.random() < 0.5 else ()
        return Request(
            request_id=f"{self._rng.getrandbits(128):032x}",
            prompt_token_ids=(*prefix, *self._tokens(_PROMPT_TOKENS - len(prefix))),
            sampling=TokenSampling(
                temperature=0.0, top_k=0, top_p=1.0, seed=0, max_tokens=_MAX_TOKENS, min_tokens=0,
                stop_token_ids=frozenset(),
            ),
            stop=(),
            slo=Slo("default", SloLimits(2.0, 0.1)),
            tenant=f"tenant-{self._number % 7}",
            arrived_at=self._now,
            deadline=self._now + 600.0,
        )  # fmt: skip

    def submit(self, request: Request) -> None:
        """The turn of the router that is measured."""
        self._dispatcher.live.submit_all([request], paced=False)

    def go_on(self) -> None:
        """What the workers do until the next request comes."""
        self._answer_commands()
        while self._unread and self._unread[0][0] <= self._now:
            _, request_id = self._unread.popleft()
            self._first_token(request_id)
        writer = self._writers[self._number % len(self._writers)]
        decoding = [(request_id, one, False) for request_id, one in writer.has.items() if one.num_tokens]
        self._step(writer, decoding)
        self._snapshot(writer)
        self._snapshot(self._readers[self._number % len(self._readers)])
        while len(self._live) > self.most_live:
            request_id, live = next(iter(self._live.items()))
            if live.num_tokens == 0:
                break
            self._step(live.writer, [(request_id, live, True)])

    def _make_dispatcher(self) -> Dispatcher:
        pool = self.pool
        prefixes, lengths = PrefixIndex(pool), OutputLengths()
        estimates = Estimates(pool, prefixes, lengths)
        policy = POLICIES["goodput"](PolicyInputs(pool, prefixes, estimates, self._rng, 4096, 1.0))
        timed = replace(
            policy,
            gate=_TimedGate(policy.gate, self.watch),
            placement=_TimedPlacement(policy.placement, self.watch),
        )
        classes = {"default": SloClass(2.0, 0.1)}
        return Dispatcher(
            pool=pool,
            prefixes=prefixes,
            lengths=lengths,
            estimates=estimates,
            policy=timed,
            recovery=Recovery(6, RetryBudget(1.0, 256)),
            limits=Limits(60.0, 1 << 20, 60.0),
            metrics=RouterMetrics(CollectorRegistry(), classes, lambda: 0, lambda: 0, lambda: ()),
            new_detokenizer=_NoText,
            clock=lambda: self._now,
            on_change=lambda: None,
            tenants=Tenants(),
        )

    def _link(self, role: worker_pb2.Role, index: int) -> _Link:
        info = worker_info(role, index)
        info.latency.clear()
        info.latency.update(_LATENCY)
        return _Link(info, self._out)

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._rng.choices(range(1000, 30000), k=count))

    def _cached(self, link: _Link) -> worker_pb2.BlockEvents:
        """Some of the prefixes."""
        event = worker_pb2.BlockEvent()
        for prefix in self._rng.sample(self._prefixes, _PREFIXES_HELD):
            for tenant in range(7):
                digests = prefix_digests(link.info.model_fingerprint, f"tenant-{tenant}", BLOCK_SIZE, prefix)
                event.stored.extend(map(short, digests))
        return worker_pb2.BlockEvents(events=[event])

    def _say(self, link: _Link, **message: Any) -> None:
        self._dispatcher.on_message(link, worker_pb2.WorkerMessage(**message))

    def _answer_commands(self) -> None:
        while self._out:
            link, message = self._out.pop()
            match message.WhichOneof("message"):
                case "pair":  # a quarter of a million with 1,000 workers: not through messages
                    pair = Pair(message.pair.prefill.worker_id, link.worker_id)
                    self.pool.pairs.put(pair, PairLink(LinkState.LINKED))
                case "reserve":
                    request_id = message.reserve.request_id
                    self._live[request_id] = link.has[request_id] = _Live(link)
                    self._say(link, reserved=worker_pb2.Reserved(request_id=request_id, attempt=1))
                case "prefill":
                    request_id = message.prefill.request_id
                    live = self._live[request_id]
                    live.reader, link.has[request_id] = link, live
                    self._unread.append((self._now + _READ_S, request_id))

    def _first_token(self, request_id: str) -> None:
        live = self._live[request_id]
        assert live.reader is not None
        del live.reader.has[request_id]
        self._step(live.reader, [(request_id, live, False)])

    def _step(self, link: _Link, steps: Sequence[tuple[str, _Live, bool]]) -> None:
        """(request id, request, whether it ends) of each that gets a token."""
        sequences = []
        for request_id, live, ends in steps:
            one = worker_pb2.SequenceTokens(
                request_id=request_id, attempt=1, first_index=live.num_tokens, token_ids=[1000]
            )
            live.num_tokens += 1
            if ends or live.num_tokens == _MAX_TOKENS:
                one.stop_reason = worker_pb2.STOP_REASON_LENGTH
                del self._live[request_id], live.writer.has[request_id]
            sequences.append(one)
        self._say(link, step=worker_pb2.StepTokens(sequences=sequences))

    def _snapshot(self, link: _Link) -> None:
        decoding = [one for one in link.has.values() if one.num_tokens]
        unread = len(link.has) if link.role is Role.PREFILL else 0
        context = sum(_PROMPT_TOKENS + one.num_tokens for one in decoding)
        step = worker_pb2.StepTime(
            decode_requests=len(decoding),
            decode_context=context,
            new_tokens=[512] if unread else [],
            cached_tokens=[0] if unread else [],
            seconds=0.01 + 6e-5 * (len(decoding) + 512 * bool(unread)),
        )
        snapshot = worker_pb2.Snapshot(
            seq=self._number,
            commands_seen=link.last_seq,
            running_requests=len(decoding) + unread,
            queue_tokens=unread * _PROMPT_TOKENS // 2,
            free_blocks=NUM_BLOCKS,
            decoding_requests=len(decoding),
            decode_context=context,
            least_tpot_s=0.1 if decoding else 0.0,
            steps=[step],
        )
        self._say(link, snapshot=snapshot)
