"""A pair in one process: a prefill and a decode service on real gRPC servers, and a router's client."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import grpc
import pytest
from prelay.v1 import worker_pb2, worker_pb2_grpc
from prometheus_client import CollectorRegistry

from decode_worker.servicer import DecodeService, DecodeSettings
from engine.fake import FAKE_VOCAB_SIZE, FakeRunner
from engine.layout import KvLayout
from engine.router_messages import Command, RouterEvent
from engine.runner import StepRunner
from engine.sequence import RequestKey, ScheduledChunk, TokenSampling
from prefill_worker.servicer import PrefillService, PrefillSettings
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
        return worker_pb2.PeerRef(
            worker_id=self.info.worker_id, epoch=self.info.epoch, address=self.info.address
        )

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


class Stream:
    """One Attach stream, read to the end by a task."""

    def __init__(self, worker: Worker, router_id: str = "router") -> None:
        self._channel = grpc.aio.insecure_channel(worker.info.address)
        self._call = worker_pb2_grpc.WorkerStub(self._channel).Attach()
        self._worker, self._router_id = worker, router_id
        self._writing = asyncio.Lock()
        self.sent = 0
        self.snapshot = worker_pb2.Snapshot()
        self.steps: list[worker_pb2.StepTime] = []
        self.messages: asyncio.Queue[worker_pb2.WorkerMessage] = asyncio.Queue()
        self._news = asyncio.Condition()

    async def attach(
        self, protocol_version: int = worker_pb2.PROTOCOL_VERSION_CURRENT, epoch: int | None = None
    ) -> worker_pb2.WorkerInfo:
        hello = worker_pb2.RouterHello(
            router_id=self._router_id,
            protocol_version=protocol_version,
            epoch=self._worker.info.epoch if epoch is None else epoch,
        )
        await self.send(hello=hello)
        answer = await self._call.read()
        self._reader = asyncio.create_task(self._read())
        return answer.hello

    async def send(self, **message: object) -> int:
        async with self._writing:
            self.sent += 1
            seq = self.sent
            await self._call.write(worker_pb2.RouterMessage(seq=seq, **message))
            return seq

    async def idle(self) -> worker_pb2.Snapshot:
        """A snapshot in which all that was sent is taken into account and nothing is left to do or held."""

        def quiet(now: worker_pb2.Snapshot) -> bool:
            held = now.running_requests + now.queue_requests + now.owned_blocks + now.leased_blocks
            return now.commands_seen == self.sent and held == 0

        return await self.snapshot_when(quiet)

    async def snapshot_when(self, condition: Callable[[worker_pb2.Snapshot], bool]) -> worker_pb2.Snapshot:
        async with asyncio.timeout(20), self._news:
            await self._news.wait_for(lambda: condition(self.snapshot))
            return self.snapshot

    async def close(self) -> None:
        self._call.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._channel.close()

    async def _read(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            while (message := await self._call.read()) is not grpc.aio.EOF:
                if message.HasField("snapshot"):
                    async with self._news:
                        self.snapshot = message.snapshot
                        self.steps += message.snapshot.steps
                        self._news.notify_all()
                else:
                    self.messages.put_nowait(message)


@dataclass
class Answer:
    """What a router has heard of one request. start: index of the token that the prefill worker draws."""

    start: int = 0
    tokens: dict[int, int] = field(default_factory=dict)
    stop_reason: int = worker_pb2.STOP_REASON_UNSPECIFIED
    failed: worker_pb2.Failed | None = None
    cached_tokens: int = 0
    decode_cached_tokens: int = 0
    times: worker_pb2.StageTimes = field(default_factory=worker_pb2.StageTimes)
    prompt_logprobs: list[worker_pb2.TokenLogprobs] = field(default_factory=list)
    reserved: asyncio.Event = field(default_factory=asyncio.Event)
    first: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def token_ids(self) -> list[int]:
        assert sorted(self.tokens) == list(range(len(self.tokens)))
        return [self.tokens[i] for i in range(len(self.tokens))]


class Router:
    """Places requests on one pair as the router does: Reserve, Reserved, Prefill, tokens by index."""

    def __init__(self, prefill: Worker, decode: Worker, router_id: str = "router") -> None:
        self.prefill, self.decode = Stream(prefill, router_id), Stream(decode, router_id)
        self._refs = (prefill.ref, decode.ref)
        self.answers: defaultdict[RequestKey, Answer] = defaultdict(Answer)
        self.pair_states: asyncio.Queue[worker_pb2.PairState] = asyncio.Queue()
        self.blocks: asyncio.Queue[worker_pb2.BlockEvents] = asyncio.Queue()

    async def attach(self) -> None:
        await self.prefill.attach()
        await self.decode.attach()
        self._tasks = [asyncio.create_task(self._collect(s)) for s in (self.prefill, self.decode)]

    async def reserve(
        self,
        key: RequestKey,
        prompt: int | Sequence[int],
        wanted: TokenSampling,
        salt: str = "",
        num_output_tokens: int = 0,
    ) -> Answer:
        """prompt: where it does not matter, only its length."""
        name = {
            "request_id": key.request_id,
            "attempt": key.attempt,
            "cache_salt": salt,
            "num_output_tokens": num_output_tokens,
        }
        token_ids = [1] * prompt if isinstance(prompt, int) else prompt
        self.answers[key].start = num_output_tokens
        await self.decode.send(
            reserve=worker_pb2.Reserve(
                **name, token_ids=token_ids, sampling=_wire(wanted), prefill=self._refs[0]
            )
        )
        return self.answers[key]

    async def start_prefill(
        self,
        key: RequestKey,
        prompt: Sequence[int],
        wanted: TokenSampling,
        salt: str = "",
        num_output_tokens: int = 0,
    ) -> None:
        name = {
            "request_id": key.request_id,
            "attempt": key.attempt,
            "cache_salt": salt,
            "num_output_tokens": num_output_tokens,
        }
        await self.prefill.send(
            prefill=worker_pb2.Prefill(**name, token_ids=prompt, sampling=_wire(wanted), decode=self._refs[1])
        )

    async def submit(
        self,
        key: RequestKey,
        prompt: Sequence[int],
        wanted: TokenSampling,
        salt: str = "",
        num_output_tokens: int = 0,
    ) -> Answer:
        """Returns once both workers have the request, or it failed."""
        answer = await self.reserve(key, prompt, wanted, salt, num_output_tokens)
        await answer.reserved.wait()
        if answer.failed is None:
            await self.start_prefill(key, prompt, wanted, salt, num_output_tokens)
        return answer

    async def read_here(
        self,
        key: RequestKey,
        prompt: Sequence[int],
        wanted: TokenSampling,
        salt: str = "",
        num_output_tokens: int = 0,
        urgency: worker_pb2.Urgency | None = None,
    ) -> Answer:
        """On the decode worker alone, which has to be a mixed one."""
        self.answers[key].start = num_output_tokens
        reserve = worker_pb2.Reserve(
            request_id=key.request_id,
            attempt=key.attempt,
            token_ids=prompt,
            sampling=_wire(wanted),
            cache_salt=salt,
            num_output_tokens=num_output_tokens,
            urgency=urgency,
        )
        await self.decode.send(reserve=reserve)
        return self.answers[key]

    async def cancel(self, key: RequestKey) -> None:
        for stream in (self.prefill, self.decode):
            await stream.send(cancel=worker_pb2.Cancel(request_id=key.request_id, attempt=key.attempt))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.prefill.close()
        await self.decode.close()

    async def _collect(self, stream: Stream) -> None:
        while True:
            message = await stream.messages.get()
            match message.WhichOneof("message"):
                case "reserved":
                    answer = self._answer(message.reserved)
                    answer.decode_cached_tokens = message.reserved.cached_tokens
                    answer.reserved.set()
                case "pair":
                    self.pair_states.put_nowait(message.pair)
                case "blocks" if stream is self.decode:
                    self.blocks.put_nowait(message.blocks)
                case "failed":
                    answer = self._answer(message.failed)
                    answer.failed = message.failed
                    for event in (answer.reserved, answer.first, answer.done):
                        event.set()
                case "step":
                    for tokens in message.step.sequences:
                        self._tokens(tokens)

    def _tokens(self, tokens: worker_pb2.SequenceTokens) -> None:
        answer = self._answer(tokens)
        for i, token in enumerate(tokens.token_ids, tokens.first_index):
            assert i not in answer.tokens, f"token {i} came twice"
            answer.tokens[i] = token
        if tokens.HasField("times"):
            answer.times.MergeFrom(tokens.times)
        answer.cached_tokens += tokens.cached_tokens
        answer.prompt_logprobs += tokens.prompt_logprobs
        if answer.start in answer.tokens:
            answer.first.set()
        answer.stop_reason = tokens.stop_reason or answer.stop_reason
        # The end may overtake the first token, which comes from the other worker.
        if answer.stop_reason and answer.start in answer.tokens:
            answer.done.set()

    def _answer(self, of: worker_pb2.Reserved | worker_pb2.Failed | worker_pb2.SequenceTokens) -> Answer:
        return self.answers[RequestKey(of.request_id, of.attempt)]


def _wire(wanted: TokenSampling) -> worker_pb2.TokenSampling:
    return worker_pb2.TokenSampling(
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        seed=wanted.seed,
        max_tokens=wanted.max_tokens,
        stop_token_ids=sorted(wanted.stop_token_ids),
        presence_penalty=wanted.presence_penalty,
        prompt_logprobs=wanted.prompt_logprobs,
    )


@pytest.fixture
async def make_router() -> AsyncIterator[Callable[..., Awaitable[Router]]]:
    made: list[Router] = []

    async def make(prefill: Worker, decode: Worker, router_id: str = "router") -> Router:
        router = Router(prefill, decode, router_id)
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
