"""The worker's end of Worker.Attach, the same for both roles: commands in, messages and signs of life out.

Routers number their commands; a snapshot tells a router up to which of them the figures take into account.
The engine thread says so itself, together with the figures, so a command that still waits in its inbox is
never counted as seen.

Several routers may be attached at once and may use the same request ids: inside a worker, and on the links
between workers, a request is therefore named `router_id/request_id`. A router_id names one life of one
router.

    engine thread:  Outbox   collects what a turn has to say ---> RouterBatch
    asyncio loop:   RouterStreams.deliver(RouterBatch) ---> one bounded queue for each stream ---> gRPC
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc
from prelay.v1 import worker_pb2, worker_pb2_grpc

from engine.sequence import RequestKey, StopReason, TokenSampling

_log = logging.getLogger(__name__)

MAX_UNSENT = 2048
"""A router that leaves this many messages unread is cut off."""

_STOP_REASONS = {
    None: worker_pb2.STOP_REASON_UNSPECIFIED,
    StopReason.STOP: worker_pb2.STOP_REASON_STOP,
    StopReason.LENGTH: worker_pb2.STOP_REASON_LENGTH,
}


@dataclass(frozen=True, slots=True)
class Owner:
    """The router stream that a request came from. stream: counted by this worker, never used twice."""

    stream: int
    router_id: str

    def key(self, request_id: str, attempt: int) -> RequestKey:
        """The request's name inside the worker and on links."""
        return RequestKey(f"{self.router_id}/{request_id}", attempt)

    def request_id(self, key: RequestKey) -> str:
        """The name by which the router knows the request."""
        return key.request_id[len(self.router_id) + 1 :]


@dataclass(frozen=True, slots=True)
class Command:
    """One numbered message of a router (not its hello)."""

    owner: Owner
    message: worker_pb2.RouterMessage


@dataclass(frozen=True, slots=True)
class RouterGone:
    """The stream ended: what came over it is cancelled."""

    owner: Owner


RouterEvent: TypeAlias = Command | RouterGone


@dataclass(frozen=True, slots=True)
class Load:
    """The figures of a snapshot.

    queue_requests: accepted but not yet in the batch. queue_tokens: prompt tokens not yet computed.
    """

    running_requests: int
    queue_requests: int
    queue_tokens: int
    free_blocks: int
    owned_blocks: int
    leased_blocks: int


@dataclass(frozen=True, slots=True)
class RouterBatch:
    """What one turn of the engine has to say to its routers; all of it took effect together.

    messages, commands_seen: by stream. push: tell the load now instead of on the next beat.
    """

    messages: dict[int, list[worker_pb2.WorkerMessage]]
    commands_seen: dict[int, int]
    load: Load
    push: bool


class Outbox:
    """Collects, in the engine thread, what a turn has to say to the routers: the tokens of all sequences of
    a router in one message, after what else there is for it."""

    def __init__(self) -> None:
        self._messages: dict[int, list[worker_pb2.WorkerMessage]] = {}
        self._tokens: dict[int, worker_pb2.StepTokens] = {}
        self._seen: dict[int, int] = {}
        self._push = False

    def seen(self, command: Command) -> None:
        self._seen[command.owner.stream] = command.message.seq

    def reserved(self, owner: Owner, key: RequestKey) -> None:
        message = worker_pb2.Reserved(request_id=owner.request_id(key), attempt=key.attempt)
        self._add(owner, worker_pb2.WorkerMessage(reserved=message))

    def failed(self, owner: Owner, key: RequestKey, reason: worker_pb2.FailureReason, message: str) -> None:
        request_id = owner.request_id(key)
        _log.info(
            "event=request_failed request=%s attempt=%d reason=%s why=%r",
            request_id,
            key.attempt,
            worker_pb2.FailureReason.Name(reason),
            message,
        )
        failed = worker_pb2.Failed(request_id=request_id, attempt=key.attempt, reason=reason, message=message)
        self._add(owner, worker_pb2.WorkerMessage(failed=failed))
        self._push = True

    def token(
        self,
        owner: Owner,
        key: RequestKey,
        index: int,
        token_id: int,
        stop_reason: StopReason | None,
        times: worker_pb2.StageTimes | None,
    ) -> None:
        """The token with this index in the answer."""
        step = self._tokens.setdefault(owner.stream, worker_pb2.StepTokens())
        step.sequences.append(
            worker_pb2.SequenceTokens(
                request_id=owner.request_id(key),
                attempt=key.attempt,
                first_index=index,
                token_ids=[token_id],
                stop_reason=_STOP_REASONS[stop_reason],
                times=times,
            )
        )
        self._push = self._push or stop_reason is not None

    def take(self, load: Load) -> RouterBatch:
        """Everything since the last call, and the load after it."""
        for stream, step in self._tokens.items():
            self._messages.setdefault(stream, []).append(worker_pb2.WorkerMessage(step=step))
        batch = RouterBatch(self._messages, self._seen, load, self._push)
        self._messages, self._tokens, self._seen, self._push = {}, {}, {}, False
        return batch

    def _add(self, owner: Owner, message: worker_pb2.WorkerMessage) -> None:
        self._messages.setdefault(owner.stream, []).append(message)


@dataclass(slots=True, eq=False)
class _Stream:
    """One attached router, in the asyncio thread."""

    owner: Owner
    unsent: list[worker_pb2.WorkerMessage] = field(default_factory=list)
    commands_seen: int = 1
    snapshots: int = 0
    push: bool = True
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Future[tuple[grpc.StatusCode, str]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def end(self, code: grpc.StatusCode, why: str) -> None:
        if not self.ended.done():
            self.ended.set_result((code, why))


class RouterStreams(worker_pb2_grpc.WorkerServicer):
    """All attached routers. Everything here runs in the asyncio thread.

    info: our hello. post: takes Command and RouterGone to the engine. load: the figures until the first
    batch.
    """

    def __init__(
        self,
        info: worker_pb2.WorkerInfo,
        heartbeat_s: float,
        post: Callable[[RouterEvent], None],
        load: Load,
    ) -> None:
        self._info = info
        self._heartbeat_s = heartbeat_s
        self._post = post
        self._load = load
        self._ids = itertools.count(1)
        self._streams: dict[int, _Stream] = {}
        self._stopping = False

    async def Attach(self, request_iterator: Any, context: Any) -> None:
        """One router, from hello to the end of its stream."""
        hello = await self._hello(request_iterator, context)
        stream = _Stream(Owner(next(self._ids), hello.router_id))
        self._streams[stream.owner.stream] = stream
        _log.info("event=router_attached router=%s stream=%d", hello.router_id, stream.owner.stream)
        tasks: list[asyncio.Task[tuple[grpc.StatusCode, str]]] = [
            asyncio.create_task(self._read(stream, request_iterator)),
            asyncio.create_task(self._write(stream, context)),
        ]
        why = "the call was cancelled"
        try:
            done, _ = await asyncio.wait([*tasks, stream.ended], return_when=asyncio.FIRST_COMPLETED)
            code, why = done.pop().result()
        finally:
            del self._streams[stream.owner.stream]
            for task in tasks:
                task.cancel()
            self._post(RouterGone(stream.owner))
            _log.info(
                "event=router_gone router=%s stream=%d why=%r", hello.router_id, stream.owner.stream, why
            )
        await asyncio.gather(*tasks, return_exceptions=True)
        if code is not grpc.StatusCode.OK:
            await context.abort(code, why)

    def deliver(self, batch: RouterBatch) -> None:
        """Pass on what a turn of the engine has to say; what is for an ended stream is thrown away."""
        self._load = batch.load
        for number, seen in batch.commands_seen.items():
            if (stream := self._streams.get(number)) is not None:
                stream.commands_seen = seen
        for number, messages in batch.messages.items():
            if (stream := self._streams.get(number)) is None:
                continue
            stream.unsent += messages
            stream.wake.set()
            if len(stream.unsent) > MAX_UNSENT:
                stream.end(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{len(stream.unsent)} messages are unread")
        if batch.push:
            for stream in self._streams.values():
                stream.push = True
                stream.wake.set()

    def stop(self) -> None:
        """End all streams and take no new ones."""
        self._stopping = True
        for stream in self._streams.values():
            stream.end(grpc.StatusCode.UNAVAILABLE, "the worker is stopping")

    async def _hello(self, request_iterator: Any, context: Any) -> worker_pb2.RouterHello:
        if self._stopping:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the worker is stopping")
        first: Any = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be the hello")
        hello: worker_pb2.RouterHello = first.hello
        info, refused = self._info, ""
        if hello.protocol_version != info.protocol_version:
            refused = (
                f"protocol_version: router has {hello.protocol_version}, worker has {info.protocol_version}"
            )
        elif hello.epoch != info.epoch:
            refused = f"epoch: {info.worker_id} lives epoch {info.epoch}, the router means {hello.epoch}"
        if refused:
            _log.warning("event=router_refused router=%s why=%r", hello.router_id, refused)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refused)
        await context.write(worker_pb2.WorkerMessage(hello=info))
        return hello

    async def _read(self, stream: _Stream, request_iterator: Any) -> tuple[grpc.StatusCode, str]:
        async for message in request_iterator:
            self._post(Command(stream.owner, message))
        return grpc.StatusCode.OK, "the router ended the stream"

    async def _write(self, stream: _Stream, context: Any) -> tuple[grpc.StatusCode, str]:
        loop = asyncio.get_running_loop()
        next_beat_s = loop.time()
        while True:
            messages, stream.unsent = stream.unsent, []
            for message in messages:
                await context.write(message)
            if stream.push or loop.time() >= next_beat_s:
                stream.push = False
                await context.write(self._snapshot(stream))
                next_beat_s = loop.time() + self._heartbeat_s
            if not stream.unsent and not stream.push:
                stream.wake.clear()
                try:
                    async with asyncio.timeout_at(next_beat_s):
                        await stream.wake.wait()
                except TimeoutError:
                    pass

    def _snapshot(self, stream: _Stream) -> worker_pb2.WorkerMessage:
        stream.snapshots += 1
        load = self._load
        return worker_pb2.WorkerMessage(
            snapshot=worker_pb2.Snapshot(
                seq=stream.snapshots,
                commands_seen=stream.commands_seen,
                running_requests=load.running_requests,
                queue_requests=load.queue_requests,
                queue_tokens=load.queue_tokens,
                free_blocks=load.free_blocks,
                owned_blocks=load.owned_blocks,
                leased_blocks=load.leased_blocks,
            )
        )


def sampling_of(message: worker_pb2.TokenSampling) -> TokenSampling:
    """As the engine takes it: top_p 0, the wire's "not given", means all."""
    return TokenSampling(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p or 1.0,
        seed=message.seed,
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
    )
