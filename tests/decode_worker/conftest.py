"""A pair in one process: a prefill and a decode service on real gRPC servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import grpc
import pytest
from prelay.v1 import worker_pb2
from prometheus_client import CollectorRegistry

from decode_worker.servicer import DecodeService, DecodeSettings
from engine.fake import FAKE_VOCAB_SIZE, FakeRunner
from engine.layout import KvLayout
from engine.router_messages import Command, RouterEvent
from engine.runner import StepRunner
from engine.sequence import ScheduledChunk, TokenSampling
from prefill_worker.servicer import PrefillService, PrefillSettings
from tests.decode_worker.pair_client import Router, Stream, ref
from transfer.base import Backend, KvMemory
from transfer.ipc import IpcBackend, SharedSegment
from transfer.layout import Part, WorkerLayout
from transfer.memory import MemoryBackend

LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32")


def sampling(
    max_tokens: int = 8, stop: Sequence[int] = (), seed: int = 0, presence_penalty: float = 0.0
) -> TokenSampling:
    return TokenSampling(1.0, 0, 1.0, seed, max_tokens, 0, frozenset(stop), presence_penalty=presence_penalty)


@dataclass
class Hooks:
    """Called in the engine threads before each step, and in the transfer thread before each copy."""

    prefill_step: Callable[[Sequence[ScheduledChunk]], None] = lambda chunks: None
    decode_step: Callable[[Sequence[ScheduledChunk]], None] = lambda chunks: None
    copy: Callable[[Part], None] = lambda part: None


@dataclass
class Worker:
    info: worker_pb2.WorkerInfo
    service: PrefillService | DecodeService
    server: grpc.aio.Server
    segment: SharedSegment
    registry: CollectorRegistry
    fatal: list[BaseException]
    posted: list[RouterEvent] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def took(self, condition: Callable[[RouterEvent], bool]) -> None:
        """Until such an event is in the engine's inbox, or further."""
        async with asyncio.timeout(20):
            while not any(map(condition, self.posted)):
                self.news.clear()
                await self.news.wait()

    async def took_all_of(self, stream: Stream) -> None:
        """Until the last command that was sent on the stream is in the engine's inbox, or further."""
        await self.took(lambda event: isinstance(event, Command) and event.message.seq == stream.sent)

    @property
    def ref(self) -> worker_pb2.PeerRef:
        return ref(self.info)

    def metric(self, name: str, **labels: str) -> float:
        value = self.registry.get_sample_value(name, labels)
        assert value is not None, f"no sample {name} {labels}"
        return value

    async def stop(self) -> None:
        await self.service.stop()
        await self.server.stop(grace=0)


@dataclass
class Pair:
    """Makes workers, and ends those that a test leaves behind.

    load: makes the engine over a worker's memory; fake engines with hooks, if it is not set.
    """

    hooks: Hooks = field(default_factory=Hooks)
    num_blocks: int = 64
    lease_s: float = 30.0
    max_batch_tokens: int = 16
    max_num_seqs: int = 4
    backend: str = "memory"
    layout: KvLayout = LAYOUT
    load: Callable[[SharedSegment], StepRunner] | None = None
    workers: list[Worker] = field(default_factory=list)
    memories: dict[str, KvMemory] = field(default_factory=dict)

    async def prefill(
        self, epoch: int = 1, layout: KvLayout | None = None, fingerprint: str = "model"
    ) -> Worker:
        layout = layout or self.layout
        segment = SharedSegment.create(layout, self.num_blocks, epoch)
        runner = self._runner(segment, layout, lambda chunks: self.hooks.prefill_step(chunks))
        info = self._info("prefill-0", worker_pb2.ROLE_PREFILL, epoch, fingerprint)
        registry, fatal = CollectorRegistry(), list[BaseException]()
        service = PrefillService(
            info,
            runner,
            *self._memory("prefill-0", segment, layout),
            registry,
            PrefillSettings(self.max_batch_tokens, 0.05, self.lease_s, digest_share=1.0),
            on_fatal=fatal.append,
        )
        return await self._serve(Worker(info, service, grpc.aio.server(), segment, registry, fatal))

    async def decode(
        self, epoch: int = 1, *, is_mixed: bool = False, latency: Mapping[str, float] | None = None
    ) -> Worker:
        """latency: coefficients of the model of its steps, which is not known else."""
        segment = SharedSegment.create(self.layout, self.num_blocks, epoch)
        runner = self._runner(segment, self.layout, lambda chunks: self.hooks.decode_step(chunks))
        role = worker_pb2.ROLE_MIXED if is_mixed else worker_pb2.ROLE_DECODE
        info = self._info("decode-0", role, epoch, "model")
        info.latency.update(latency or {})
        registry, fatal = CollectorRegistry(), list[BaseException]()
        service = DecodeService(
            info,
            runner,
            *self._memory("decode-0", segment, self.layout),
            registry,
            DecodeSettings(self.max_num_seqs, self.max_batch_tokens, 0.05, self.lease_s, digest_share=1.0),
            on_fatal=fatal.append,
        )
        return await self._serve(Worker(info, service, grpc.aio.server(), segment, registry, fatal))

    def _memory(
        self, worker_id: str, segment: SharedSegment, layout: KvLayout
    ) -> tuple[KvMemory, list[Backend]]:
        memory = KvMemory(WorkerLayout.of(layout), (segment.blocks,), segment.generations)
        self.memories[worker_id] = memory
        if self.backend == "ipc":
            return memory, [IpcBackend(memory, [segment])]
        return memory, [MemoryBackend(memory, self.memories, lambda part: self.hooks.copy(part))]

    def _runner(
        self, segment: SharedSegment, layout: KvLayout, hook: Callable[[Sequence[ScheduledChunk]], None]
    ) -> StepRunner:
        if self.load is not None:
            return self.load(segment)
        return FakeRunner(segment.blocks.numpy(), layout.block_size, hook, layout.num_layers)

    def _info(
        self, worker_id: str, role: worker_pb2.Role, epoch: int, fingerprint: str
    ) -> worker_pb2.WorkerInfo:
        return worker_pb2.WorkerInfo(
            worker_id=worker_id,
            epoch=epoch,
            role=role,
            model_fingerprint=fingerprint,
            max_model_len=200,
            vocab_size=FAKE_VOCAB_SIZE,
            protocol_version=worker_pb2.PROTOCOL_VERSION_CURRENT,
        )

    async def _serve(self, worker: Worker) -> Worker:
        post = worker.service._routers._post

        def noted(event: RouterEvent) -> None:
            post(event)
            worker.posted.append(event)
            worker.news.set()

        worker.service._routers._post = noted
        worker.service.add_to(worker.server)
        worker.info.address = f"127.0.0.1:{worker.server.add_insecure_port('127.0.0.1:0')}"
        await worker.service.start()
        await worker.server.start()
        self.workers.append(worker)
        return worker


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    made = Pair()
    yield made
    for worker in made.workers:
        await worker.stop()


@pytest.fixture
async def make_router() -> AsyncIterator[Callable[..., Awaitable[Router]]]:
    made: list[Router] = []

    async def make(prefill: Worker, decode: Worker, router_id: str = "router") -> Router:
        router = Router(prefill.info, decode.info, router_id)
        await router.attach()
        made.append(router)
        return router

    yield make
    for router in made:
        await router.close()


@pytest.fixture(name="sampling")
def sampling_fixture() -> Callable[..., TokenSampling]:
    return sampling


@pytest.fixture
def kv_layout() -> KvLayout:
    return LAYOUT
