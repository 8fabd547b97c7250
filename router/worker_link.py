"""The router's end of one `Worker.Attach` stream: one life of one worker.

    connect: dial, hello both ways, check --> up --> down (stream ended, no sign of life, or closed), for good

A link never heals: a worker whose stream broke has cancelled what was placed on it, so it comes back by being
registered again. Both ends must speak the same protocol version; the minor version may differ.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from prelay.v1 import worker_pb2, worker_pb2_grpc

from engine.link_secret import metadata_of
from engine.tls import Identity, dial
from router.errors import WorkerRefusedError, WorkerUnreachableError
from router.pool_view import Role

ROLE_OF_PROTO = {
    worker_pb2.ROLE_PREFILL: Role.PREFILL,
    worker_pb2.ROLE_DECODE: Role.DECODE,
    worker_pb2.ROLE_MIXED: Role.MIXED,
}

PROTO_OF_ROLE = {role: proto for proto, role in ROLE_OF_PROTO.items()}

_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    # A new life behind an old address gets a connection of its own, not the old one's back-off.
    ("grpc.use_local_subchannel_pool", 1),
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Registration:
    """What the launcher announced: the life to talk to, where, and the proof that opens its door."""

    worker_id: str
    epoch: int
    role: Role
    address: str
    proof: str = ""


class WorkerLink:
    """An attached worker. Commands go out in the order of `send`; messages come in through `on_message`."""

    def __init__(
        self,
        registration: Registration,
        info: worker_pb2.WorkerInfo,
        channel: grpc.aio.Channel,
        call: Any,  # aio.StreamStreamCall: the stubs are not typed
    ) -> None:
        """Made by `connect`."""
        self.worker_id = registration.worker_id
        self.epoch = registration.epoch
        self.role = registration.role
        self.info = info
        self.last_snapshot: worker_pb2.Snapshot | None = None
        self._channel = channel
        self._call = call
        self._next_seq = 2  # the hello was 1
        self._outgoing: asyncio.Queue[worker_pb2.RouterMessage] = asyncio.Queue()
        self._down = False
        self._silent_s = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    def start(
        self,
        on_message: Callable[[WorkerLink, worker_pb2.WorkerMessage], None],
        on_down: Callable[[WorkerLink, str], None],
    ) -> None:
        """Starts reading and writing. `on_down` is called once, with the reason, unless `close` was."""
        self._on_down = on_down
        self._tasks = [asyncio.create_task(self._read(on_message)), asyncio.create_task(self._write())]

    @property
    def up(self) -> bool:
        """False from the moment the link is down or closed."""
        return not self._down

    def send(self, message: worker_pb2.RouterMessage) -> int:
        """Queues a command and returns its number. After the end of the link it goes nowhere."""
        message.seq = self._next_seq
        self._next_seq += 1
        if not self._down:
            self._outgoing.put_nowait(message)
        return message.seq

    def take_role(self, role: Role) -> None:
        """The worker has another role from now on, in the same life."""
        self.role = role
        self.info.role = PROTO_OF_ROLE[role]

    def silent(self, elapsed_s: float) -> float:
        """Adds time without a snapshot; returns how long there has been none, seconds."""
        self._silent_s += elapsed_s
        return self._silent_s

    def fail(self, reason: str) -> None:
        """Declares the worker down."""
        if not self._down:
            self._down = True
            self._call.cancel()
            self._on_down(self, reason)

    async def close(self) -> None:
        """Ends the stream (the worker cancels what is left of ours) and frees the connection. Repeatable."""
        self._down = True
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()

    async def _read(self, on_message: Callable[[WorkerLink, worker_pb2.WorkerMessage], None]) -> None:
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                if message.WhichOneof("message") == "snapshot":
                    self._silent_s = 0.0
                    self.last_snapshot = message.snapshot
                on_message(self, message)
            reason = "it ended the stream"
        except grpc.aio.AioRpcError as error:
            reason = f"its stream broke: {error.code().name} {error.details()}"
        except Exception:
            # A message that we cannot deal with must not leave a link that nobody reads.
            _log.exception("worker=%s event=message_not_handled", self.worker_id)
            reason = "the router could not handle a message of it"
        self.fail(reason)

    async def _write(self) -> None:
        try:
            while True:
                await self._call.write(await self._outgoing.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self.fail(f"its stream does not take commands: {error}")


async def connect(
    registration: Registration, router_id: str, timeout_s: float, identity: Identity | None = None
) -> WorkerLink:
    """Dials the worker and exchanges hellos. identity: of this router; None is without TLS.

    Raises WorkerUnreachableError when it does not answer, WorkerRefusedError when it is not what was
    announced.
    """
    channel = dial(registration.address, identity, _CHANNEL_OPTIONS)
    try:
        async with asyncio.timeout(timeout_s):
            metadata = metadata_of(registration.proof)
            call = worker_pb2_grpc.WorkerStub(channel).Attach(metadata=metadata)
            hello = worker_pb2.RouterHello(
                router_id=router_id,
                protocol_version=worker_pb2.PROTOCOL_VERSION_CURRENT,
                protocol_minor=worker_pb2.PROTOCOL_MINOR_CURRENT,
                epoch=registration.epoch,
            )
            await call.write(worker_pb2.RouterMessage(seq=1, hello=hello))
            answer = await call.read()
        if answer is grpc.aio.EOF or answer.WhichOneof("message") != "hello":
            raise WorkerRefusedError(f"worker {registration.worker_id} did not begin its stream with a hello")
        _check(registration, answer.hello)
        return WorkerLink(registration, answer.hello, channel, call)
    except TimeoutError:
        await channel.close()
        raise WorkerUnreachableError(
            f"worker {registration.worker_id} at {registration.address} did not answer within {timeout_s:g} s"
        ) from None
    except grpc.aio.AioRpcError as error:
        await channel.close()
        refused = error.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAUTHENTICATED)
        kind = WorkerRefusedError if refused else WorkerUnreachableError
        where = f"worker {registration.worker_id} at {registration.address}"
        raise kind(f"{where}: {error.code().name} {error.details()}") from error
    except BaseException:
        await channel.close()
        raise


def _check(registration: Registration, hello: worker_pb2.WorkerInfo) -> None:
    role = ROLE_OF_PROTO.get(hello.role)
    for field, announced, said in (
        ("worker_id", registration.worker_id, hello.worker_id),
        ("epoch", registration.epoch, hello.epoch),
        ("role", registration.role, role),
        ("protocol_version", worker_pb2.PROTOCOL_VERSION_CURRENT, hello.protocol_version),
    ):
        if announced != said:
            raise WorkerRefusedError(
                f"the worker at {registration.address} says {field} {said}, but {announced} was expected"
            )
