"""Clients of a router that is measured: many streams over gRPC or HTTP, in a process of their own.

Each stream sends a short prompt, reads the answer to its end and sends the next. Its first answer is shorter
than the others, by chance, so that they do not all end in the same instant. What is counted is cheap, so that
the clients leave the machine to the router: tokens, and how long before each a worker had sent it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import grpc
import grpc.aio
import numpy as np
from prelay.v1 import inference_pb2

from bench.router_stamp import TICK_S, age_of_token, ages_in_text, now_ticks

_STREAMS_PER_CHANNEL = 64
_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
_LAST_CHUNK = b"0\r\n\r\n"
_PROMPT = "What is measured here? #%06d"


@dataclass(frozen=True, slots=True)
class Begin:
    """So many streams over "grpc" or "http", for answers of so many tokens. leaves: of the clients, 0 to 1,
    who hang up in the midst of an answer, and then ask for another one."""

    front: str
    streams: int
    max_tokens: int
    leaves: float = 0.0


@dataclass(frozen=True, slots=True)
class Watch:
    """For so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class End:
    """Of all streams."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What came within `seconds`. requests: that were answered to the end; left: that were not, as the client
    hung up. pieces: messages or reads from a socket. p50_ms, p99_ms: from a worker's sending of a token to
    its arrival here. error: the first that was seen, or empty."""

    seconds: float
    requests: int
    left: int
    tokens: int
    pieces: int
    p50_ms: float
    p99_ms: float
    cpu_s: float
    error: str


class Counters:
    """What all streams have seen since they were made."""

    def __init__(self) -> None:
        self.requests = self.left = self.pieces = 0
        self.ages: array[int] = array("H")
        self.error = ""
        self._began = time.monotonic()
        self._cpu_s = time.process_time()

    def seen(self) -> Seen:
        ages = np.frombuffer(self.ages, dtype=np.uint16) if self.ages else np.zeros(1)
        p50, p99 = np.percentile(ages, [50, 99]) * TICK_S * 1e3
        return Seen(
            time.monotonic() - self._began,
            self.requests,
            self.left,
            len(self.ages),
            self.pieces,
            float(p50),
            float(p99),
            time.process_time() - self._cpu_s,
            self.error,
        )


def serve(connection: Connection, grpc_address: str, http_address: str, model: str) -> None:
    """Answers Begin and End with None, and Watch with what was seen."""
    asyncio.run(_serve(connection, grpc_address, http_address, model))


async def _serve(connection: Connection, grpc_address: str, http_address: str, model: str) -> None:
    crowd = Crowd(grpc_address, http_address, model)
    loop = asyncio.get_running_loop()
    while (question := await loop.run_in_executor(None, connection.recv)) is not None:
        match question:
            case Begin():
                crowd.begin(question)
                connection.send(None)
            case Watch(seconds):
                connection.send(await crowd.watch(seconds))
            case End():
                await crowd.end()
                connection.send(None)


class Crowd:
    """The streams that are open."""

    def __init__(self, grpc_address: str, http_address: str, model: str) -> None:
        self.counters = Counters()
        self._grpc_address = grpc_address
        self._http_address = http_address
        self._model = model
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self, what: Begin) -> None:
        """Opens them."""
        run: Callable[[int, Begin], Awaitable[None]]
        run = self._grpc_streams if what.front == "grpc" else self._http_stream
        share = _STREAMS_PER_CHANNEL if what.front == "grpc" else 1
        for first in range(0, what.streams, share):
            count = min(share, what.streams - first)
            self._tasks.append(asyncio.create_task(self._run(run(count, what))))

    async def watch(self, seconds: float) -> Seen:
        """What they see in that time."""
        self.counters = Counters()
        await asyncio.sleep(seconds)
        return self.counters.seen()

    async def end(self) -> None:
        """Closes them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _run(self, streams: Awaitable[None]) -> None:
        try:
            await streams
        except (grpc.aio.AioRpcError, OSError, EOFError, RuntimeError) as error:
            self.counters.error = self.counters.error or f"{type(error).__name__}: {error}"

    async def _grpc_streams(self, count: int, what: Begin) -> None:
        async with grpc.aio.insecure_channel(self._grpc_address, options=_OWN_CONNECTION) as channel:
            generate = channel.unary_stream(
                "/prelay.v1.Inference/Generate",
                request_serializer=inference_pb2.GenerateRequest.SerializeToString,
                response_deserializer=inference_pb2.GenerateResponse.FromString,
            )
            await asyncio.gather(*(self._grpc_stream(generate, index, what) for index in range(count)))

    async def _grpc_stream(
        self,
        generate: grpc.aio.UnaryStreamMultiCallable[Any, inference_pb2.GenerateResponse],
        index: int,
        what: Begin,
    ) -> None:
        for num_tokens in _lengths(what.max_tokens):
            sampling = inference_pb2.SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0)
            request = inference_pb2.GenerateRequest(text=_PROMPT % index, sampling=sampling)
            call, stays = generate(request), _stays(what, num_tokens)
            async for message in call:
                ticks, counters = now_ticks(), self.counters
                counters.pieces += 1
                for token_id in message.token_ids:
                    counters.ages.append(age_of_token(token_id, ticks))
                if (stays := stays - 1) == 0:
                    call.cancel()
                    counters.left += 1
                    break
            else:
                self.counters.requests += 1

    async def _http_stream(self, count: int, what: Begin) -> None:
        """One connection, until its client leaves; its requests come one after the other."""
        host, port = self._http_address.rsplit(":", 1)
        loop, lengths = asyncio.get_running_loop(), _lengths(what.max_tokens)
        while True:
            _, protocol = await loop.create_connection(lambda: EventReader(self), host, int(port))
            with contextlib.closing(protocol), contextlib.suppress(_LeftError):
                for num_tokens in lengths:
                    request = self._http_request(_PROMPT % count, num_tokens)
                    await protocol.answer(request, _stays(what, num_tokens))
                    self.counters.requests += 1

    def _http_request(self, prompt: str, max_tokens: int) -> bytes:
        body = json.dumps(
            {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
            }
        ).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._http_address}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


def _lengths(max_tokens: int) -> Iterator[int]:
    """Of a stream's answers, without end."""
    yield random.randint(1, max_tokens)
    while True:
        yield max_tokens


def _stays(what: Begin, num_tokens: int) -> int:
    """For how many pieces of an answer a client stays; -1 is to its end."""
    return random.randint(1, num_tokens) if random.random() < what.leaves else -1


class _LeftError(Exception):
    """The client has hung up."""


class EventReader(asyncio.Protocol):
    """An HTTP connection that sends requests and counts what is in event streams, and nothing else."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self._transport: asyncio.Transport | None = None
        self._rest = self._tail = b""
        self._stays = -1
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def answer(self, request: bytes, stays: int = -1) -> None:
        """Sends it, and returns at the end of the answer. Raises _LeftError after so many pieces; OSError,
        RuntimeError."""
        assert self._transport is not None
        self._stays = stays
        done = self.expect()
        self._transport.write(request)
        await done

    def expect(self) -> asyncio.Future[None]:
        """Done at the end of the next answer."""
        self._done = asyncio.get_running_loop().create_future()
        return self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        ticks, counters = now_ticks(), self._crowd.counters
        self._tail = (self._tail + data)[-len(_LAST_CHUNK) :]
        data = self._rest + data
        end = data.rfind(b"\n") + 1
        lines, self._rest = data[:end], data[end:]
        if lines.startswith(b"HTTP/1.1 ") and not lines.startswith(b"HTTP/1.1 200 "):
            self._end(RuntimeError(data.decode(errors="replace")))
            return
        counters.pieces += 1
        begin = lines.find(b"data: ")
        if begin >= 0:
            counters.ages.extend(ages_in_text(lines[begin:], ticks))
        if self._tail == _LAST_CHUNK:
            self._end(None)
        elif (stays := self._stays - 1) == 0:
            counters.left += 1
            self._end(_LeftError())
        else:
            self._stays = stays

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or EOFError("the router has closed the connection"))

    def _end(self, error: Exception | None) -> None:
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)
