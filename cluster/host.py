"""The worker process: a Ray actor that holds one engine and serves one role over gRPC.

The life of a worker: pin to its cores, import torch, set up KV memory, start its other ranks, read the
weights, listen; then `serving` waits until the process dies. Ray starts the process and sees its end; routers
and peers talk to it over gRPC, never through Ray. It dies with its Ray node.

A worker of several ranks is this process, which leads as rank 0, and one more for each of the others. The
leader makes the KV memory of all of them, so that transfers need nobody else. When a rank ends, the leader
ends itself, and when the leader ends, so do the ranks.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from prelay.v1 import worker_pb2

from cluster.cores import pin_process, share_cores

if TYPE_CHECKING:
    # At run time torch is imported after pinning, in a thread of its own: it takes seconds.
    import grpc
    from prometheus_client import CollectorRegistry

    from engine.config import EngineConfig
    from engine.engine import Engine
    from engine.runner import StepRunner
    from transfer.base import Backend, KvMemory
    from transfer.ipc import SharedSegment

logger = logging.getLogger(__name__)

_SERVER_OPTIONS = (
    # A router or a peer whose host is gone without a word is found out within 10 s.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)

_FRACTION_IMPORTED = 0.5
_FRACTION_ALLOCATED = 0.6
"""How far the start has come, in time on the demo model: torch is imported, KV memory is there."""


@dataclass(frozen=True, slots=True)
class HostSpec:
    """Everything that one life of one worker needs to know.

    threads: of each rank. first_slot, slots: which of its node's cores are its own (`cores.share_cores`).
    max_num_seqs: 0 for prefill. backend: see transfer.backends.make_backends.
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
    tp_size: int
    pp_size: int
    threads: int
    first_slot: int
    slots: int
    max_batch_tokens: int
    max_num_seqs: int
    heartbeat_s: float
    lease_s: float
    digest_share: float
    backend: str

    @property
    def num_ranks(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def num_cpus(self) -> int:
        return self.num_ranks * self.threads


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
        engine, memory, backends = await asyncio.to_thread(self._load, node_address)
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
            vocab_size=engine.model_config.vocab_size,
        )
        self._service = self._build(info, engine.runner, memory, backends, registry)
        self._server = aio.server(options=_SERVER_OPTIONS)
        self._service.add_to(self._server)
        info.address = f"{node_address}:{self._server.add_insecure_port(f'{node_address}:0')}"
        await self._service.start()
        await self._server.start()
        self._progress = Progress("ready", 1.0)
        return StartReport(
            info.SerializeToString(),
            sum(blocks.nbytes for blocks in memory.ranks),
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

    def _load(self, node_address: str) -> tuple[Engine, KvMemory, list[Backend]]:
        """In a thread, so that `progress` answers."""
        self._progress = Progress("importing torch", 0.0)
        importlib.import_module("torch")
        from engine.config import EngineConfig, ModelConfig
        from engine.layout import KvLayout
        from transfer.backends import make_backends
        from transfer.base import KvMemory
        from transfer.ipc import SharedSegment
        from transfer.layout import WorkerLayout

        spec = self._spec
        config = EngineConfig(
            num_blocks=spec.num_blocks,
            block_size=spec.block_size,
            max_batch_tokens=spec.max_batch_tokens,
            dtype=spec.dtype,
            load=spec.load,
            threads=spec.threads,
        )
        whole = KvLayout.of(ModelConfig.from_pretrained(spec.checkpoint), config)
        layout = WorkerLayout.of(whole, spec.tp_size, spec.pp_size)
        layouts = [layout.rank(rank) for rank in range(layout.num_ranks)]
        mib = spec.num_blocks * sum(each.block_nbytes for each in layouts) / 2**20
        self._progress = Progress(f"allocating {mib:.0f} MiB of KV cache", _FRACTION_IMPORTED)
        logger.info(
            "event=kv_cache worker=%s tokens=%d gib=%.2f",
            spec.worker_id,
            spec.num_blocks * spec.block_size,
            mib / 1024,
        )
        segments = [SharedSegment.create(each, spec.num_blocks, spec.epoch) for each in layouts]
        memory = KvMemory(layout, tuple(each.blocks for each in segments), segments[0].generations)
        name = f"{spec.worker_id}-{spec.epoch}"
        backends = make_backends(spec.backend, memory, segments, node_address, name)
        self._weights_read(0.0)
        return self._load_engine(config, segments), memory, backends

    def _load_engine(self, config: EngineConfig, segments: Sequence[SharedSegment]) -> Engine:
        from engine.engine import Engine
        from engine.parallel.ranks import load_parallel
        from engine.parallel.shared_memory import SharedMemory

        spec = self._spec
        if len(segments) == 1:
            return Engine.load(spec.checkpoint, config, segments[0].data_buffer, self._weights_read)
        engine, _ = load_parallel(
            spec.checkpoint,
            config,
            spec.tp_size,
            spec.pp_size,
            [share.cores for share in self._shares],
            [
                SharedMemory(
                    each.ref.fd, each.ref.num_bytes - each.data_buffer.nbytes, each.data_buffer.nbytes
                )
                for each in segments
            ],
            self._weights_read,
            self._give_up,
        )
        return engine

    def _weights_read(self, fraction: float) -> None:
        done = _FRACTION_ALLOCATED + (1.0 - _FRACTION_ALLOCATED) * fraction
        self._progress = Progress("reading weights", done)

    def _give_up(self, error: BaseException) -> None:
        """When the role cannot go on, or a rank has ended: the remedy is a new process. From any thread."""
        logger.critical(
            "worker_gives_up worker=%s epoch=%d", self._spec.worker_id, self._spec.epoch, exc_info=error
        )
        os._exit(1)

    @abstractmethod
    def _build(
        self,
        info: worker_pb2.WorkerInfo,
        runner: StepRunner,
        memory: KvMemory,
        backends: Sequence[Backend],
        registry: CollectorRegistry,
    ) -> Service:
        """The role's service over a loaded engine."""


class PrefillHost(WorkerHost):
    """Reads prompts."""

    role = worker_pb2.ROLE_PREFILL

    def _build(
        self,
        info: worker_pb2.WorkerInfo,
        runner: StepRunner,
        memory: KvMemory,
        backends: Sequence[Backend],
        registry: CollectorRegistry,
    ) -> Service:
        from prefill_worker.servicer import PrefillService, PrefillSettings

        spec = self._spec
        settings = PrefillSettings(
            max_batch_tokens=spec.max_batch_tokens,
            heartbeat_s=spec.heartbeat_s,
            lease_s=spec.lease_s,
            digest_share=spec.digest_share,
        )
        return PrefillService(info, runner, memory, backends, registry, settings, on_fatal=self._give_up)


class DecodeHost(WorkerHost):
    """Writes answers."""

    role = worker_pb2.ROLE_DECODE

    def _build(
        self,
        info: worker_pb2.WorkerInfo,
        runner: StepRunner,
        memory: KvMemory,
        backends: Sequence[Backend],
        registry: CollectorRegistry,
    ) -> Service:
        from decode_worker.servicer import DecodeService, DecodeSettings

        spec = self._spec
        settings = DecodeSettings(
            max_num_seqs=spec.max_num_seqs,
            max_batch_tokens=spec.max_batch_tokens,
            heartbeat_s=spec.heartbeat_s,
            lease_s=spec.lease_s,
            digest_share=spec.digest_share,
        )
        return DecodeService(info, runner, memory, backends, registry, settings, on_fatal=self._give_up)
