"""The worker process: a Ray actor that holds one engine and serves one role over gRPC.

The life of a worker: pin to its cores, import torch, set up KV memory, read the weights, listen; then
`serving` waits until the process dies. Ray starts the process and sees its end; routers
and peers talk to it over gRPC, never through Ray. It dies with its Ray node.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from prelay.v1 import worker_pb2

from cluster.cores import CoreShare, pin_process, share_cores

if TYPE_CHECKING:
    # At run time torch is imported after pinning, in a thread of its own: it takes seconds.
    import grpc
    from prometheus_client import CollectorRegistry

    from engine.engine import Engine
    from transfer.ipc import SharedSegment

logger = logging.getLogger(__name__)

_FRACTION_IMPORTED = 0.5
_FRACTION_ALLOCATED = 0.6
"""How far the start has come, in time on the demo model: torch is imported, KV memory is there."""


@dataclass(frozen=True, slots=True)
class HostSpec:
    """Everything that one life of one worker needs to know.

    first_slot, slots: which of its node's cores are its own (`cores.share_cores`). max_num_seqs: 0 for
    prefill.
    """

    worker_id: str
    epoch: int
    checkpoint: Path
    model_name: str
    max_model_len: int
    dtype: str
    load: str
    block_size: int
    num_blocks: int
    threads: int
    first_slot: int
    slots: int
    max_batch_tokens: int
    max_num_seqs: int
    heartbeat_s: float
    lease_s: float


@dataclass(frozen=True, slots=True)
class Progress:
    """stage: what the worker is doing, for a person. fraction: of the whole way until it serves, 0 to 1."""

    stage: str
    fraction: float


@dataclass(frozen=True, slots=True)
class StartReport:
    """info: a serialised WorkerInfo. cores_shared: other workers run on these cores too."""

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
        self._share: CoreShare = share_cores(allowed, spec.first_slot, spec.threads, spec.slots)
        pin_process(self._share.cores)

    async def progress(self) -> Progress:
        """Answers also while the model loads."""
        return self._progress

    async def start(self) -> StartReport:
        """Load the model and serve. Raises EngineError, TransferError or OSError."""
        from grpc import aio
        from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
        from ray.util import get_node_ip_address

        spec = self._spec
        engine, segment = await asyncio.to_thread(self._load)
        node_address = get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray leaves it untyped
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
            pid=os.getpid(),
            vocab_size=engine.model_config.vocab_size,
        )
        self._service = self._build(info, engine, segment, registry)
        self._server = aio.server()
        self._service.add_to(self._server)
        info.address = f"{node_address}:{self._server.add_insecure_port(f'{node_address}:0')}"
        await self._service.start()
        await self._server.start()
        self._progress = Progress("ready", 1.0)
        return StartReport(
            info.SerializeToString(),
            spec.num_blocks * engine.layout.block_nbytes,
            self._share.cores,
            self._share.shared,
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

    def _load(self) -> tuple[Engine, SharedSegment]:
        """In a thread, so that `progress` answers."""
        self._progress = Progress("importing torch", 0.0)
        importlib.import_module("torch")
        from engine.config import EngineConfig, ModelConfig
        from engine.engine import Engine
        from engine.layout import KvLayout
        from transfer.ipc import SharedSegment

        spec = self._spec
        config = EngineConfig(
            num_blocks=spec.num_blocks,
            block_size=spec.block_size,
            max_batch_tokens=spec.max_batch_tokens,
            dtype=spec.dtype,
            load=spec.load,
            threads=spec.threads,
        )
        layout = KvLayout.of(ModelConfig.from_pretrained(spec.checkpoint), config)
        mib = spec.num_blocks * layout.block_nbytes / 2**20
        self._progress = Progress(f"allocating {mib:.0f} MiB of KV cache", _FRACTION_IMPORTED)
        logger.info(
            "event=kv_cache worker=%s tokens=%d gib=%.2f",
            spec.worker_id,
            spec.num_blocks * spec.block_size,
            mib / 1024,
        )
        segment = SharedSegment.create(layout, spec.num_blocks, spec.epoch)
        self._weights_read(0.0)
        return Engine.load(spec.checkpoint, config, segment.data_buffer, self._weights_read), segment

    def _weights_read(self, fraction: float) -> None:
        done = _FRACTION_ALLOCATED + (1.0 - _FRACTION_ALLOCATED) * fraction
        self._progress = Progress("reading weights", done)

    def _give_up(self, error: BaseException) -> None:
        """From the engine thread, when its role cannot go on: the remedy is a new process."""
        logger.critical(
            "worker_gives_up worker=%s epoch=%d", self._spec.worker_id, self._spec.epoch, exc_info=error
        )
        os._exit(1)

    @abstractmethod
    def _build(
        self, info: worker_pb2.WorkerInfo, engine: Engine, segment: SharedSegment, registry: CollectorRegistry
    ) -> Service:
        """The role's service over a loaded engine."""


class PrefillHost(WorkerHost):
    """Reads prompts."""

    role = worker_pb2.ROLE_PREFILL

    def _build(
        self, info: worker_pb2.WorkerInfo, engine: Engine, segment: SharedSegment, registry: CollectorRegistry
    ) -> Service:
        from prefill_worker.servicer import PrefillService, PrefillSettings

        spec = self._spec
        settings = PrefillSettings(
            max_batch_tokens=spec.max_batch_tokens, heartbeat_s=spec.heartbeat_s, lease_s=spec.lease_s
        )
        return PrefillService(
            info, engine.runner, engine.layout, segment, registry, settings, on_fatal=self._give_up
        )


class DecodeHost(WorkerHost):
    """Writes answers."""

    role = worker_pb2.ROLE_DECODE

    def _build(
        self, info: worker_pb2.WorkerInfo, engine: Engine, segment: SharedSegment, registry: CollectorRegistry
    ) -> Service:
        from decode_worker.servicer import DecodeService, DecodeSettings

        spec = self._spec
        settings = DecodeSettings(
            max_num_seqs=spec.max_num_seqs,
            max_batch_tokens=spec.max_batch_tokens,
            heartbeat_s=spec.heartbeat_s,
            lease_s=spec.lease_s,
        )
        return DecodeService(
            info, engine.runner, engine.layout, segment, registry, settings, on_fatal=self._give_up
        )
