"""The worker's end of Worker.Attach, the same for both roles: commands in, messages and signs of life out.

engine thread:  Outbox   collects what a turn has to say ---> RouterBatch
asyncio loop:   RouterStreams.deliver(RouterBatch) ---> one bounded list for each stream ---> gRPC
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from prelay.v1 import worker_pb2, worker_pb2_grpc

from engine.block_changes import ChangeLog
from engine.router_messages import Command, Load, Owner, RouterBatch, RouterEvent, RouterGone
from engine.step_log import StepLog

_log = logging.getLogger(__name__)

MAX_UNSENT = 2048
"""A router that leaves this many messages unread is cut off."""


@dataclass(slots=True, eq=False)
class _Stream:
    """One attached router, in the asyncio thread."""

    owner: Owner
    unsent: list[worker_pb2.WorkerMessage] = field(default_factory=list)
    commands_seen: int = 1
    snapshots: int = 0
    push: bool = True
    blocks: ChangeLog = field(default_factory=ChangeLog)
    steps: StepLog = field(default_factory=lambda: StepLog(random.Random(0)))
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
    batch. clock: stamps commands. hello_timeout_s: how long a new stream may leave us without its hello.
    """

    def __init__(
        self,
        info: worker_pb2.WorkerInfo,
        heartbeat_s: float,
        post: Callable[[RouterEvent], None],
        load: Load,
        clock: Callable[[], float],
        hello_timeout_s: float = 5.0,
    ) -> None:
        self._clock = clock
        self._hello_timeout_s = hello_timeout_s
        self._info = info
        self._heartbeat_s = heartbeat_s
        self._post = post
        self._load = load
        self._ids = itertools.count(1)
        self._streams: dict[int, _Stream] = {}
        # Digests of all that is in the prefix cache, in the order in which it came.
        self._cached: dict[int, None] = {}
        self._stopping = False

    async def Attach(self, request_iterator: Any, context: Any) -> None:
        """One router, from hello to the end of its stream."""
        hello = await self._hello(request_iterator, context)
        stream = _Stream(Owner(next(self._ids), hello.router_id))
        stream.blocks.stored(self._cached)
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
        self._cached.update(dict.fromkeys(batch.blocks.stored))
        for digest in batch.blocks.removed:
            self._cached.pop(digest, None)
        for stream in self._streams.values():
            for step in batch.steps:
                stream.steps.add(step)
            if batch.blocks:
                stream.blocks.stored(batch.blocks.stored)
                stream.blocks.removed(batch.blocks.removed)
                stream.wake.set()
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
        try:
            async with asyncio.timeout(self._hello_timeout_s):
                first: Any = await anext(aiter(request_iterator), None)
        except TimeoutError:
            why = f"no hello within {self._hello_timeout_s} s"
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, why)
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
            self._post(Command(stream.owner, message, self._clock()))
        return grpc.StatusCode.OK, "the router ended the stream"

    async def _write(self, stream: _Stream, context: Any) -> tuple[grpc.StatusCode, str]:
        loop = asyncio.get_running_loop()
        next_beat_s = loop.time()
        while True:
            messages, stream.unsent = stream.unsent, []
            for message in messages:
                await context.write(message)
            for blocks in stream.blocks.take().messages():
                await context.write(worker_pb2.WorkerMessage(blocks=blocks))
            if stream.push or loop.time() >= next_beat_s:
                stream.push = False
                await context.write(self._snapshot(stream))
                next_beat_s = loop.time() + self._heartbeat_s
            if not (stream.unsent or stream.push or stream.blocks):
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
                cached_blocks=load.cached_blocks,
                decoding_requests=load.decoding_requests,
                decode_context=load.decode_context,
                least_tpot_s=load.least_tpot_s,
                ahead_s=load.ahead_s,
                steps=stream.steps.take(),
            )
        )
