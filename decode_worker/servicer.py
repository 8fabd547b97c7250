"""The decode or mixed role as a service: engine thread, routers' streams, links to prefill workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
from prelay.v1 import worker_pb2, worker_pb2_grpc
from prometheus_client import CollectorRegistry

from decode_worker.acceptance import Acceptance
from decode_worker.loop import DecodeEvent, DecodeOutput, DecodeRole
from decode_worker.scheduler import DecodeScheduler
from engine.block_pool import BlockPool
from engine.latency import LatencyModel, OnlineLatency
from engine.loop import EngineLoop
from engine.metrics import WorkerMetrics
from engine.prefix_cache import PrefixCache
from engine.router_messages import Load, RouterBatch
from engine.router_stream import RouterStreams
from engine.runner import StepRunner
from engine.tls import Identity
from transfer.base import Backend, KvMemory
from transfer.handoff import Connect, Disconnect, Lend, Recall, SendAcknowledge, SendDrop
from transfer.handshake import our_handshake
from transfer.metrics import LeaseMetrics, PullMetrics
from transfer.pull_links import PullLinks

STOP_TIMEOUT_S = 1.5


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """max_num_seqs: most sequences in one step. max_batch_tokens: most tokens in one step, those of prompts
    and those that are computed again after a preemption included. heartbeat_s: between snapshots. lease_s:
    how long blocks stay set aside for a hand-off without news, and how long a link may be silent.
    digest_share: of the requests, 0 to 1, whose KV is checked by digests. secret, identity: with which
    prefill workers are dialled."""

    max_num_seqs: int
    max_batch_tokens: int
    heartbeat_s: float
    lease_s: float
    digest_share: float
    secret: str = field(default="", repr=False)
    identity: Identity | None = None


class DecodeService:
    """One decode worker, or a mixed one, if that is what `info` says.

    memory: the KV pool; `runner` computes on its bytes. backends: ways to read a prefill worker's blocks,
    best first; closed with the service. on_fatal: called in the engine thread when the engine cannot go on;
    the worker should end then.
    """

    def __init__(
        self,
        info: worker_pb2.WorkerInfo,
        runner: StepRunner,
        memory: KvMemory,
        backends: Sequence[Backend],
        registry: CollectorRegistry,
        settings: DecodeSettings,
        clock: Callable[[], float] = time.monotonic,
        *,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._backends = backends
        layout, names = memory.layout, [backend.name for backend in backends]
        num_blocks = len(memory.generations)
        pool = BlockPool(num_blocks, layout.block_size, memory.generations)
        cache = PrefixCache(pool, info.model_fingerprint)
        latency = OnlineLatency(LatencyModel.from_coefficients(info.latency))
        is_mixed = info.role == worker_pb2.ROLE_MIXED
        self._info = info
        self._acceptance = Acceptance(pool, info.max_model_len, info.vocab_size, reads_prompts=is_mixed)
        role = DecodeRole(
            runner,
            pool,
            cache,
            layout.num_layers,
            DecodeScheduler(pool, cache, settings.max_num_seqs, settings.max_batch_tokens, latency),
            self._acceptance,
            settings.lease_s,
            clock,
            WorkerMetrics(registry, "decode"),
            LeaseMetrics(registry),
            PullMetrics(registry, names),
        )
        self._engine: EngineLoop[DecodeEvent, DecodeOutput] = EngineLoop(role, self._deliver, on_fatal, clock)
        idle = Load(0, 0, 0, num_blocks, 0, 0)
        self._routers = RouterStreams(info, settings.heartbeat_s, self._engine.post, idle, clock)
        self._links = PullLinks(
            our_handshake(info, layout, names, settings.digest_share),
            memory,
            backends,
            settings.lease_s,
            self._engine.post,
            clock,
            settings.secret,
            settings.identity,
        )

    def add_to(self, server: grpc.aio.Server) -> None:
        """Before the server starts."""
        worker_pb2_grpc.add_WorkerServicer_to_server(self._routers, server)

    async def start(self) -> None:
        """info.address is set by now."""
        self._engine.start()

    def take_role(self, role: worker_pb2.Role) -> None:
        """Decode or mixed, instead of the other. A decode worker that was mixed goes on reading what routers
        send it to read: they may have done so before they knew."""
        self._info.role = role
        if role == worker_pb2.ROLE_MIXED:
            self._acceptance.reads_prompts = True

    async def stop(self) -> bool:
        """Ends streams, links and the engine thread, within 3 s. A copy that runs is left to itself. Returns
        whether none does, and no step of ours is running any more."""
        self._routers.stop()
        await self._links.stop()
        has_ended = await self._engine.stop(STOP_TIMEOUT_S)
        has_ended = await self._links.copies_end(STOP_TIMEOUT_S) and has_ended
        for backend in self._backends:
            backend.close()
        return has_ended

    def _deliver(self, outputs: Sequence[DecodeOutput]) -> None:
        for output in outputs:
            match output:
                case RouterBatch():
                    self._routers.deliver(output)
                case Connect(peer, address):
                    self._links.connect(peer, address)
                case Disconnect(link):
                    self._links.disconnect(link)
                case Lend():
                    self._links.lend(output)
                case Recall(key):
                    self._links.recall(key)
                case SendAcknowledge(link, key):
                    self._links.send_acknowledge(link, key)
                case SendDrop(link, key):
                    self._links.send_drop(link, key)
