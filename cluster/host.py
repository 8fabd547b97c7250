"""The worker process: a Ray actor that holds one engine and serves one role over gRPC.

The life of a worker: pin to its cores, import torch, set up KV memory, start its other ranks, read the
weights, measure its steps, listen; then `serving` waits until the process dies. Ray starts the process and
sees its end; routers and peers talk to it over gRPC, never through Ray. It dies with its Ray node.

A worker of several ranks is this process, which leads as rank 0, and one more for each of the others. The
leader makes the KV memory of all of them, so that transfers need nobody else. When a rank ends, the leader
ends itself, and when the leader ends, so do the ranks.
"""

from __future__ import annotations

import asyncio
import logging
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from prelay.v1 import worker_pb2

from cluster.cores import CoreShare, pin_process, share_cores
from cluster.host_engine import HostEngine, load_engine
from cluster.host_spec import HostSpec

if TYPE_CHECKING:
    import grpc
    from prometheus_client import CollectorRegistry

logger = logging.getLogger(__name__)

_SERVER_OPTIONS = (
    # A router or a peer whose host is gone without a word is found out within 10 s.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)


@dataclass(frozen=True, slots=True)
class Progress:
    """stage: what the worker is doing, for a person. fraction: of the whole way until it serves, 0 to 1."""

    stage: str
    fraction: float


@dataclass(frozen=True, slots=True)
class StartReport:
    """info: a serialised WorkerInfo. cores: of all ranks. cores_shared: others run on these cores, too."""

    info: bytes
    kv_bytes: int
    cores: tuple[int, ...]
    cores_shared: bool


class Service(Protocol):
    """What PrefillService and DecodeService have in common."""

    def add_to(self, server: grpc.aio.Server) -> None: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class WorkerHost(ABC):
    """The actor. Its subclasses name the role, which is what `ps` and `ray list actors` show."""

    role: worker_pb2.Role

    def __init__(self, spec: HostSpec) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        self._spec = spec
        self._progress = Progress("starting", 0.0)
        self._service: Service | None = None
        self._server: grpc.aio.Server | None = None
        allowed = sorted(os.sched_getaffinity(0))
        if spec.is_simulated:
            # It sleeps most of the time: it gets in nobody's way wherever it runs.
            self._shares = [CoreShare(tuple(allowed), shared=False)]
            return
        self._shares = [
            share_cores(allowed, spec.first_slot + rank * spec.threads, spec.threads, spec.slots)
            for rank in range(spec.num_ranks)
        ]
        pin_process(self._shares[0].cores)

    async def progress(self) -> Progress:
        """Answers also while the model loads."""
        return self._progress

    async def start(self) -> StartReport:
        """Load the model and serve. Raises EngineError, TransferError or OSError."""
        from grpc import aio
        from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
        from ray.util import get_node_ip_address

        spec = self._spec
        node_address = get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray leaves it untyped
        engine = await asyncio.to_thread(
            load_engine, spec, self._shares, node_address, self._progressed, self._give_up
        )
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        metrics_server, _ = start_http_server(0, addr=node_address, registry=registry)
        info = worker_pb2.WorkerInfo(
            worker_id=spec.worker_id,
            epoch=spec.epoch,
            role=self.role,
            metrics_address=f"{node_address}:{metrics_server.server_port}",
            model=spec.model_name,
            model_fingerprint=engine.fingerprint,
            max_model_len=spec.max_model_len,
            block_size=spec.block_size,
            num_blocks=spec.num_blocks,
            max_num_seqs=spec.max_num_seqs,
            max_batch_tokens=spec.max_batch_tokens,
            protocol_version=worker_pb2.PROTOCOL_VERSION_CURRENT,
            protocol_minor=worker_pb2.PROTOCOL_MINOR_CURRENT,
            pid=os.getpid(),
            vocab_size=engine.vocab_size,
            latency=engine.latency,
            num_devices=spec.num_ranks,
        )
        self._service = self._build(info, engine, registry)
        self._server = aio.server(options=_SERVER_OPTIONS)
        self._service.add_to(self._server)
        info.address = f"{node_address}:{self._server.add_insecure_port(f'{node_address}:0')}"
        await self._service.start()
        await self._server.start()
        self._progress = Progress("ready", 1.0)
        return StartReport(
            info.SerializeToString(),
            sum(blocks.nbytes for blocks in engine.memory.ranks),
            tuple(sorted({core for share in self._shares for core in share.cores})),
            self._shares[0].shared,
        )

    async def serving(self) -> None:
        """Never returns: that it fails is how Ray tells the launcher that this process has ended."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """Stop serving, within the 2 s that the service promises."""
        if self._service is not None:
            await self._service.stop()
        if self._server is not None:
            await self._server.stop(grace=0)

    def _progressed(self, stage: str, fraction: float) -> None:
        self._progress = Progress(stage, fraction)

    def _give_up(self, error: BaseException) -> None:
        """When the role cannot go on, or a rank has ended: the remedy is a new process. From any thread."""
        logger.critical(
            "worker_gives_up worker=%s epoch=%d", self._spec.worker_id, self._spec.epoch, exc_info=error
        )
        os._exit(1)

    @abstractmethod
    def _build(self, info: worker_pb2.WorkerInfo, engine: HostEngine, registry: CollectorRegistry) -> Service:
        """The role's service over a loaded engine."""


class PrefillHost(WorkerHost):
    """Reads prompts."""

    role = worker_pb2.ROLE_PREFILL

    def _build(self, info: worker_pb2.WorkerInfo, engine: HostEngine, registry: CollectorRegistry) -> Service:
        from prefill_worker.servicer import PrefillService, PrefillSettings

        spec = self._spec
        settings = PrefillSettings(
            max_batch_tokens=spec.max_batch_tokens,
            heartbeat_s=spec.heartbeat_s,
            lease_s=spec.lease_s,
            digest_share=spec.digest_share,
        )
        return PrefillService(
            info, engine.runner, engine.memory, engine.backends, registry, settings, on_fatal=self._give_up
        )


class DecodeHost(WorkerHost):
    """Writes answers."""

    role = worker_pb2.ROLE_DECODE

    def _build(self, info: worker_pb2.WorkerInfo, engine: HostEngine, registry: CollectorRegistry) -> Service:
        from decode_worker.servicer import DecodeService, DecodeSettings

        spec = self._spec
        settings = DecodeSettings(
            max_num_seqs=spec.max_num_seqs,
            max_batch_tokens=spec.max_batch_tokens,
            heartbeat_s=spec.heartbeat_s,
            lease_s=spec.lease_s,
            digest_share=spec.digest_share,
        )
        return DecodeService(
            info, engine.runner, engine.memory, engine.backends, registry, settings, on_fatal=self._give_up
        )


class MixedHost(DecodeHost):
    """Writes answers, and reads prompts beside that where the router wants it: its service looks at the role
    in its info."""

    role = worker_pb2.ROLE_MIXED
