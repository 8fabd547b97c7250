"""The worker process: a Ray actor that holds one engine and serves one role over gRPC.

The life of a worker: pin to its cores, import torch, set up KV memory, start its other ranks, read the
weights, measure its steps, listen; then `serving` waits until the process dies. Ray starts the process and
sees its end; routers and peers talk to it over gRPC, never through Ray. It dies with its Ray node.

A process may have several lives, one after the other: `become` ends what is served and serves another role
on the same engine, under another epoch and at other addresses. Between the two roles that write
`read_prompts` is enough, in the middle of a life.

A worker of several ranks is this process, which leads as rank 0, and one more for each of the others. The
leader makes the KV memory of all of them, so that transfers need nobody else. When a rank ends, the leader
ends itself, and when the leader ends, so do the ranks.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from prelay.v1 import worker_pb2

from cluster.cores import CoreShare, pin_process, share_cores
from cluster.errors import WorkerError
from cluster.host_engine import HostEngine, load_engine, measured
from cluster.host_services import Service, service_of
from cluster.host_spec import HostSpec

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

    import grpc

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


class WorkerHost:
    """The actor."""

    def __init__(self, wire: Mapping[str, Any]) -> None:
        """wire: of a HostSpec, which a launcher of another version may have made."""
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        self._spec = spec = HostSpec.from_wire(wire)
        self._progress = Progress("starting", 0.0)
        self._engine: HostEngine | None = None
        self._serves: _Serves | None = None
        self._report: StartReport | None = None
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

    async def life(self) -> tuple[dict[str, Any], StartReport] | None:
        """What it serves, as a HostSpec's wire, and what it said when that began; None if it serves nothing
        (yet). For a launcher that has not started it."""
        report = self._report
        return None if self._serves is None or report is None else (self._spec.to_wire(), report)

    async def start(self) -> StartReport:
        """Load the model and serve. Raises EngineError, TransferError or OSError."""
        engine = self._engine = await asyncio.to_thread(
            load_engine, self._spec, self._shares, _node_address(), self._progressed, self._give_up
        )
        return await self._serve(engine, engine.latency)

    async def become(self, wire: Mapping[str, Any]) -> StartReport:
        """Begin another life, on what is loaded: of the same worker, with a greater epoch and perhaps another
        role. What the earlier one still had is cancelled; routers see its streams end.

        wire: of a HostSpec; its latency is empty if it is to measure its steps, which takes about two
        seconds. Raises WorkerError if somebody still works on the memory: then only a new process helps.
        """
        spec, engine = HostSpec.from_wire(wire), self._engine
        if engine is None:
            raise WorkerError(f"worker {spec.worker_id} is still starting")
        self._progressed("ending the earlier role", 0.0)
        if not await self.stop():
            raise WorkerError(f"worker {spec.worker_id} does not get its earlier role to an end")
        self._spec = spec
        engine.reopen(spec.epoch)
        latency = spec.latency or await asyncio.to_thread(measured, spec, engine.runner, self._progressed)
        return await self._serve(engine, latency)

    async def read_prompts(self, *, reads: bool) -> None:
        """From now on a worker that writes is a mixed one, or a decode worker again. What it has goes on."""
        if self._serves is None or self._spec.role == worker_pb2.ROLE_PREFILL:
            raise WorkerError(f"worker {self._spec.worker_id} does not write answers")
        role = worker_pb2.ROLE_MIXED if reads else worker_pb2.ROLE_DECODE
        self._spec = replace(self._spec, role=role)
        self._serves.service.take_role(role)

    async def _serve(self, engine: HostEngine, latency: Mapping[str, float]) -> StartReport:
        from grpc import aio
        from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

        from engine.link_secret import SecretInterceptor
        from engine.tls import Identity, listen

        spec, node_address = self._spec, _node_address()
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        metrics_server, _ = start_http_server(0, addr=node_address, registry=registry)
        info = worker_pb2.WorkerInfo(
            worker_id=spec.worker_id,
            epoch=spec.epoch,
            role=spec.role,
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
            latency=latency,
            num_devices=spec.num_ranks,
            tensor_parallel=spec.tp_size,
            pipeline_parallel=spec.pp_size,
            kv_token_bytes=sum(blocks.nbytes for blocks in engine.memory.ranks)
            // (spec.num_blocks * spec.block_size),
            version=importlib.metadata.version("prelay"),
        )
        identity = None if spec.tls is None else Identity(spec.tls)
        service = service_of(info, engine, spec, registry, identity, self._give_up)
        interceptors = [SecretInterceptor(spec.secret, spec.worker_id, spec.epoch)] if spec.secret else []
        server = aio.server(options=_SERVER_OPTIONS, interceptors=interceptors)
        self._serves = _Serves(service, server, metrics_server)
        service.add_to(server)
        info.address = f"{node_address}:{listen(server, f'{node_address}:0', identity)}"
        await service.start()
        await server.start()
        self._progress = Progress("ready", 1.0)
        self._report = StartReport(
            info.SerializeToString(),
            sum(blocks.nbytes for blocks in engine.memory.ranks),
            tuple(sorted({core for share in self._shares for core in share.cores})),
            self._shares[0].shared,
        )
        return self._report

    async def serving(self) -> None:
        """Never returns: that it fails is how Ray tells the launcher that this process has ended."""
        await asyncio.Event().wait()

    async def stop(self) -> bool:
        """Stop serving, within the 3 s that the service promises. Returns whether all that it did has ended:
        no step and no copy is still running."""
        serves, self._serves = self._serves, None
        if serves is None:
            return True
        has_ended = await serves.service.stop()
        await serves.server.stop(grace=0)
        await asyncio.to_thread(_close_metrics, serves.metrics)
        return has_ended

    def _progressed(self, stage: str, fraction: float) -> None:
        self._progress = Progress(stage, fraction)

    def _give_up(self, error: BaseException) -> None:
        """When the role cannot go on, or a rank has ended: the remedy is a new process. From any thread."""
        logger.critical(
            "worker_gives_up worker=%s epoch=%d", self._spec.worker_id, self._spec.epoch, exc_info=error
        )
        os._exit(1)


@dataclass(frozen=True, slots=True)
class _Serves:
    """What one life of a worker listens with."""

    service: Service
    server: grpc.aio.Server
    metrics: WSGIServer


def _close_metrics(server: WSGIServer) -> None:
    server.shutdown()
    server.server_close()


def _node_address() -> str:
    from ray.util import get_node_ip_address

    address: str = get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray leaves it untyped
    return address
