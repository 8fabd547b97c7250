"""The prefill role as a service: engine thread, routers' streams and decode workers' links together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
from prelay.v1 import transfer_pb2_grpc, worker_pb2, worker_pb2_grpc
from prometheus_client import CollectorRegistry

from engine.block_pool import BlockPool
from engine.latency import LatencyModel, OnlineLatency
from engine.loop import EngineLoop
from engine.metrics import WorkerMetrics
from engine.prefix_cache import PrefixCache
from engine.router_messages import Command, Load, RouterBatch, RouterEvent
from engine.router_stream import RouterStreams
from engine.runner import StepRunner
from prefill_worker.loop import LAYER_GROUPS, PrefillEvent, PrefillOutput, PrefillRole
from transfer.base import Backend, KvMemory
from transfer.handoff import Fence, Peer, SendComplete, SendOffer, SendWithdraw
from transfer.handshake import our_handshake
from transfer.metrics import LeaseMetrics
from transfer.offer_links import OfferLinks

STOP_TIMEOUT_S = 1.5


@dataclass(frozen=True, slots=True)
class PrefillSettings:
    """max_batch_tokens: most prompt tokens in one step. heartbeat_s: between snapshots. lease_s: how long
    an offer stands, and how long a link may be silent. digest_share: of the requests, 0 to 1, whose KV is
    checked by digests. layer_groups: the parts in which a large chunk is offered while it is computed; 0: it
    is offered when it is computed."""

    max_batch_tokens: int
    heartbeat_s: float
    lease_s: float
    digest_share: float
    layer_groups: int = LAYER_GROUPS


class PrefillService:
    """One prefill worker.

    memory: the KV pool; `runner` computes on its bytes. backends: ways to read it that decode workers may
    choose from; closed with the service. on_fatal: called in the engine thread when the engine cannot go on;
    the worker should end then.
    """

    def __init__(
        self,
        info: worker_pb2.WorkerInfo,
        runner: StepRunner,
        memory: KvMemory,
        backends: Sequence[Backend],
        registry: CollectorRegistry,
        settings: PrefillSettings,
        clock: Callable[[], float] = time.monotonic,
        *,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._backends = backends
        layout = memory.layout
        num_blocks = len(memory.generations)
        pool = BlockPool(num_blocks, layout.block_size, memory.generations)
        role = PrefillRole(
            runner,
            pool,
            PrefixCache(pool, info.model_fingerprint),
            memory.generations,
            layout.num_layers,
            settings.max_batch_tokens,
            info.max_model_len,
            info.vocab_size,
            settings.lease_s,
            OnlineLatency(LatencyModel.from_coefficients(info.latency)),
            clock,
            WorkerMetrics(registry, "prefill"),
            LeaseMetrics(registry),
            settings.layer_groups,
        )
        self._engine: EngineLoop[PrefillEvent, PrefillOutput] = EngineLoop(
            role, self._deliver, on_fatal, clock
        )
        idle = Load(0, 0, 0, num_blocks, 0, 0)
        self._routers = RouterStreams(info, settings.heartbeat_s, self._from_router, idle, clock)
        names = [backend.name for backend in backends]
        self._links = OfferLinks(
            our_handshake(info, layout, names, settings.digest_share),
            memory,
            backends,
            settings.lease_s,
            self._engine.post,
            clock,
        )

    def add_to(self, server: grpc.aio.Server) -> None:
        """Before the server starts."""
        worker_pb2_grpc.add_WorkerServicer_to_server(self._routers, server)
        transfer_pb2_grpc.add_KvTransferServicer_to_server(self._links, server)

    async def start(self) -> None:
        """info.address is set by now."""
        self._engine.start()

    def take_role(self, role: worker_pb2.Role) -> None:
        """This service has one role."""
        raise ValueError("a prefill worker cannot take another role in the middle of a life")

    async def stop(self) -> bool:
        """Ends streams, links and the engine thread, within 2 s. No peer can open our memory after it.
        Returns whether no step of ours is running any more."""
        self._routers.stop()
        self._links.stop()
        has_ended = await self._engine.stop(STOP_TIMEOUT_S)
        for backend in self._backends:
            backend.close()
        return has_ended

    def _from_router(self, event: RouterEvent) -> None:
        if isinstance(event, Command) and event.message.HasField("prefill"):
            prefill = event.message.prefill
            key = event.owner.key(prefill.request_id, prefill.attempt)
            # Now, for the engine may be in a long step, and the decode worker waits for a sign of it.
            self._links.promise(Peer(prefill.decode.worker_id, prefill.decode.epoch), key)
        self._engine.post(event)

    def _deliver(self, outputs: Sequence[PrefillOutput]) -> None:
        for output in outputs:
            match output:
                case RouterBatch():
                    self._routers.deliver(output)
                case SendOffer(link, key, part):
                    self._links.send_offer(link, key, part)
                case SendComplete(link, key, num_tokens, first_token):
                    self._links.send_complete(link, key, num_tokens, first_token)
                case SendWithdraw(link, key):
                    self._links.send_withdraw(link, key)
                case Fence(link, message):
                    self._links.close(link, message)
