"""The decode role as a service: engine thread, routers' streams and links to prefill workers together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import grpc
from prelay.v1 import worker_pb2, worker_pb2_grpc
from prometheus_client import CollectorRegistry

from decode_worker.loop import DecodeEvent, DecodeOutput, DecodeRole
from engine.block_pool import BlockPool
from engine.layout import KvLayout
from engine.loop import EngineLoop
from engine.metrics import WorkerMetrics
from engine.prefix_cache import PrefixCache
from engine.router_messages import Load, RouterBatch
from engine.router_stream import RouterStreams
from engine.runner import StepRunner
from transfer.handoff import Connect, Fetch, SendAcknowledge, SendDrop
from transfer.handshake import our_handshake, segment_ref
from transfer.ipc import IpcBackend, SharedSegment
from transfer.metrics import LeaseMetrics, PullMetrics
from transfer.pull_links import OpenBackend, PullLinks

STOP_TIMEOUT_S = 1.5


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """max_num_seqs: most sequences in one step. max_batch_tokens: most tokens in one step, those that are
    computed again after a preemption included. heartbeat_s: between snapshots. lease_s: how long blocks stay
    set aside for a hand-off without news, and how long a link may be silent."""

    max_num_seqs: int
    max_batch_tokens: int
    heartbeat_s: float
    lease_s: float


class DecodeService:
    """One decode worker.

    segment: the KV pool; `runner` computes on its bytes. on_fatal: called in the engine thread when the
    engine cannot go on; the worker should end then. backends: ways to read a prefill worker's blocks, best
    first; shared memory if not given.
    """

    def __init__(
        self,
        info: worker_pb2.WorkerInfo,
        runner: StepRunner,
        layout: KvLayout,
        segment: SharedSegment,
        registry: CollectorRegistry,
        settings: DecodeSettings,
        clock: Callable[[], float] = time.monotonic,
        *,
        on_fatal: Callable[[BaseException], None],
        backends: Mapping[str, OpenBackend] | None = None,
    ) -> None:
        self._segment = segment
        if backends is None:
            backends = {
                IpcBackend.name: lambda theirs: IpcBackend(segment_ref(theirs), theirs.epoch, segment)
            }
        pool = BlockPool(segment.num_blocks, layout.block_size, segment.generations)
        role = DecodeRole(
            runner,
            pool,
            PrefixCache(pool, info.model_fingerprint),
            settings.max_num_seqs,
            settings.max_batch_tokens,
            info.max_model_len,
            settings.lease_s,
            clock,
            WorkerMetrics(registry, "decode"),
            LeaseMetrics(registry),
            PullMetrics(registry, backends),
        )
        self._engine: EngineLoop[DecodeEvent, DecodeOutput] = EngineLoop(role, self._deliver, on_fatal, clock)
        idle = Load(0, 0, 0, segment.num_blocks, 0, 0)
        self._routers = RouterStreams(info, settings.heartbeat_s, self._engine.post, idle, clock)
        handshake = our_handshake(info, layout, list(backends), None)
        self._links = PullLinks(
            handshake, backends, layout.block_nbytes, settings.lease_s, self._engine.post, clock
        )

    def add_to(self, server: grpc.aio.Server) -> None:
        """Before the server starts."""
        worker_pb2_grpc.add_WorkerServicer_to_server(self._routers, server)

    async def start(self) -> None:
        """info.address is set by now."""
        self._engine.start()

    async def stop(self) -> None:
        """Ends streams, links and the engine thread, within 2 s. A copy that runs is left to itself."""
        self._routers.stop()
        await self._links.stop()
        await self._engine.stop(STOP_TIMEOUT_S)
        self._segment.close()

    def _deliver(self, outputs: Sequence[DecodeOutput]) -> None:
        for output in outputs:
            match output:
                case RouterBatch():
                    self._routers.deliver(output)
                case Connect(peer, address):
                    self._links.connect(peer, address)
                case Fetch():
                    self._links.fetch(output)
                case SendAcknowledge(link, key):
                    self._links.send_acknowledge(link, key)
                case SendDrop(link, key):
                    self._links.send_drop(link, key)
