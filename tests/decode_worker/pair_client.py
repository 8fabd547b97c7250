"""What talks to a pair in its tests as a router does."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
from prelay.v1 import worker_pb2, worker_pb2_grpc

from engine.sequence import RequestKey, TokenSampling


def ref(info: worker_pb2.WorkerInfo) -> worker_pb2.PeerRef:
    return worker_pb2.PeerRef(worker_id=info.worker_id, epoch=info.epoch, address=info.address)


class Stream:
    """One Attach stream, read to the end by a task."""

    def __init__(self, worker: worker_pb2.WorkerInfo, router_id: str = "router") -> None:
        self._channel = grpc.aio.insecure_channel(worker.address)
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
            epoch=self._worker.epoch if epoch is None else epoch,
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

    def __init__(
        self, prefill: worker_pb2.WorkerInfo, decode: worker_pb2.WorkerInfo, router_id: str = "router"
    ) -> None:
        self.prefill, self.decode = Stream(prefill, router_id), Stream(decode, router_id)
        self._refs = (ref(prefill), ref(decode))
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
