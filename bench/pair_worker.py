"""A prefill or a decode worker in a process of its own, which notes when its steps and copies run.

The service, the engine and the gRPC server are those of production; between service and engine, and between
service and backend, sits something that looks at the clock. All times are of CLOCK_MONOTONIC, which is the
same in all processes of a host.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
from prelay.v1 import transfer_pb2, worker_pb2
from prometheus_client import CollectorRegistry

from decode_worker.servicer import DecodeService, DecodeSettings
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.layout import KvLayout
from engine.runner import StepRunner
from engine.sequence import ChunkResult, ScheduledChunk
from prefill_worker.servicer import PrefillService, PrefillSettings
from transfer.backends import make_backends
from transfer.base import Backend, KvMemory, Pull
from transfer.handoff import LinkId
from transfer.ipc import SharedSegment
from transfer.layout import Box, Part, Route, WorkerLayout

HOST = "127.0.0.1"
_EPOCH = 1
_HEARTBEAT_S = 0.5
_LEASE_S = 10.0


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """layer_groups: of a prefill worker (PrefillSettings). max_num_seqs: of a decode worker."""

    worker_id: str
    role: worker_pb2.Role
    checkpoint: Path
    load: str
    backend: str
    max_model_len: int
    num_blocks: int
    max_batch_tokens: int
    layer_groups: int = 0
    max_num_seqs: int = 1


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step: of so many sequences, with so many tokens together. start_s, end_s: monotonic."""

    start_s: float
    end_s: float
    num_seqs: int
    num_tokens: int

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Noted:
    """Since somebody asked last. copies: of a decode worker, from and to."""

    steps: list[Step] = field(default_factory=list)
    copies: list[tuple[float, float]] = field(default_factory=list)


def serve_worker(connection: Connection, spec: WorkerSpec) -> None:
    """In a process: sends its WorkerInfo when it serves, then answers whatever it is asked with Noted."""
    asyncio.run(_serve(connection, spec))


async def _serve(connection: Connection, spec: WorkerSpec) -> None:
    config = EngineConfig(
        spec.num_blocks, max_batch_tokens=spec.max_batch_tokens, dtype="bfloat16", load=spec.load
    )
    whole = KvLayout.of(ModelConfig.from_pretrained(spec.checkpoint), config)
    segment = SharedSegment.create(whole, spec.num_blocks, _EPOCH)
    engine = Engine.load(spec.checkpoint, config, segment.data_buffer, lambda fraction: None)
    memory = KvMemory(WorkerLayout.of(whole), (segment.blocks,), segment.generations)
    noted = Noted()
    backends: list[Backend] = [
        _TimedBackend(backend, noted)
        for backend in make_backends(spec.backend, memory, [segment], HOST, spec.worker_id)
    ]
    info = worker_pb2.WorkerInfo(
        worker_id=spec.worker_id,
        epoch=_EPOCH,
        role=spec.role,
        model_fingerprint=engine.fingerprint,
        max_model_len=spec.max_model_len,
        block_size=config.block_size,
        num_blocks=spec.num_blocks,
        protocol_version=worker_pb2.PROTOCOL_VERSION_CURRENT,
        protocol_minor=worker_pb2.PROTOCOL_MINOR_CURRENT,
        vocab_size=engine.model_config.vocab_size,
    )
    gave_up = asyncio.get_running_loop().create_future()

    def give_up(error: BaseException) -> None:
        gave_up.get_loop().call_soon_threadsafe(gave_up.set_exception, error)

    service = _service(spec, info, _TimedRunner(engine.runner, noted), memory, backends, give_up)
    server = grpc.aio.server()
    service.add_to(server)
    info.address = f"{HOST}:{server.add_insecure_port(f'{HOST}:0')}"
    await service.start()
    await server.start()
    connection.send(info.SerializeToString())
    answering = asyncio.create_task(_answer(connection, noted))
    await asyncio.wait([answering, gave_up], return_when=asyncio.FIRST_COMPLETED)
    await service.stop()
    await server.stop(grace=0)
    (gave_up if gave_up.done() else answering).result()


async def _answer(connection: Connection, noted: Noted) -> None:
    while await asyncio.to_thread(connection.recv) is not None:
        # The engine's thread may add to them meanwhile: that is for the next time.
        steps, copies = list(noted.steps), list(noted.copies)
        del noted.steps[: len(steps)], noted.copies[: len(copies)]
        connection.send(Noted(steps, copies))


def _service(
    spec: WorkerSpec,
    info: worker_pb2.WorkerInfo,
    runner: StepRunner,
    memory: KvMemory,
    backends: Sequence[Backend],
    give_up: Callable[[BaseException], None],
) -> PrefillService | DecodeService:
    registry = CollectorRegistry()
    if spec.role == worker_pb2.ROLE_PREFILL:
        prefill = PrefillSettings(spec.max_batch_tokens, _HEARTBEAT_S, _LEASE_S, 0.0, spec.layer_groups)
        return PrefillService(info, runner, memory, backends, registry, prefill, on_fatal=give_up)
    decode = DecodeSettings(spec.max_num_seqs, spec.max_batch_tokens, _HEARTBEAT_S, _LEASE_S, 0.0)
    return DecodeService(info, runner, memory, backends, registry, decode, on_fatal=give_up)


class _TimedRunner:
    """A StepRunner that notes its steps."""

    def __init__(self, runner: StepRunner, noted: Noted) -> None:
        self._runner = runner
        self._noted = noted

    def step(
        self, chunks: Sequence[ScheduledChunk], on_layer: Callable[[int], None] | None = None
    ) -> list[ChunkResult]:
        start_s = time.monotonic()
        results = self._runner.step(chunks, on_layer)
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        self._noted.steps.append(Step(start_s, time.monotonic(), len(chunks), num_tokens))
        return results


class _TimedBackend:
    """A Backend whose pulls are noted."""

    def __init__(self, backend: Backend, noted: Noted) -> None:
        self._backend = backend
        self._noted = noted

    @property
    def name(self) -> str:
        return self._backend.name

    def reaches(self, theirs: transfer_pb2.Handshake) -> bool:
        return self._backend.reaches(theirs)

    def offer(self, link: LinkId, theirs: transfer_pb2.Handshake, answer: transfer_pb2.Handshake) -> None:
        self._backend.offer(link, theirs, answer)

    def end_offer(self, link: LinkId) -> None:
        self._backend.end_offer(link)

    def connect(self, theirs: transfer_pb2.Handshake, route: Route) -> Pull:
        return _TimedPull(self._backend.connect(theirs, route), self._noted)

    def close(self) -> None:
        self._backend.close()


class _TimedPull:
    """A Pull that is noted."""

    def __init__(self, pull: Pull, noted: Noted) -> None:
        self._pull = pull
        self._noted = noted

    def pull(self, part: Part, boxes: Sequence[Box]) -> None:
        start_s = time.monotonic()
        self._pull.pull(part, boxes)
        self._noted.copies.append((start_s, time.monotonic()))

    def close(self) -> None:
        self._pull.close()
