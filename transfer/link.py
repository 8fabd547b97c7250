"""One gRPC stream between two workers, seen from either end: messages in order, a sign of life, a clean end.

Both ends say every `lease_s / 4` what they hold for the other (Renew, also if it is nothing) and give the
link up after `lease_s` of silence, so that a connection that died without a word is found and dialled anew.

This file has what both ends share; `offer_links.py` is the server's end and `pull_links.py` the client's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import grpc
from prelay.v1 import transfer_pb2, worker_pb2

from engine.sequence import RequestKey
from transfer.handoff import HandoffFailure, LinkId, Peer
from transfer.layout import Part

In = TypeVar("In")
Out = TypeVar("Out")

MAX_UNSENT = 4096
"""A peer that leaves this many messages unread is given up."""


_FAILURE_REASONS = {
    HandoffFailure.PEER_UNREACHABLE: worker_pb2.FAILURE_REASON_PEER_UNREACHABLE,
    HandoffFailure.PEER_MISMATCH: worker_pb2.FAILURE_REASON_PEER_MISMATCH,
    HandoffFailure.TRANSFER_FAILED: worker_pb2.FAILURE_REASON_TRANSFER_FAILED,
    HandoffFailure.LEASE_EXPIRED: worker_pb2.FAILURE_REASON_LEASE_EXPIRED,
}


@dataclass(frozen=True, slots=True)
class LinkUp:
    """The handshake fitted. backend: how KV travels."""

    link: LinkId
    peer: Peer
    backend: str


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The link is closed, by whomever. Nothing comes over it any more."""

    link: LinkId
    why: str


@dataclass(frozen=True, slots=True)
class LinkFailed:
    """A dialled peer could not be reached or does not fit."""

    peer: Peer
    reason: HandoffFailure
    message: str


@dataclass(frozen=True, slots=True)
class FromPuller:
    link: LinkId
    message: transfer_pb2.PullerMessage
    arrived_s: float


@dataclass(frozen=True, slots=True)
class FromOfferer:
    link: LinkId
    message: transfer_pb2.OffererMessage
    arrived_s: float


@dataclass(frozen=True, slots=True)
class FetchDone:
    """The copy of a part ended.

    error: None when it is good. copy_s: time spent copying, waiting in line not included. is_digest_good:
    None if the part carried no digests.
    """

    key: RequestKey
    backend: str
    num_bytes: int
    copy_s: float
    error: str | None
    ended_s: float
    is_digest_good: bool | None


@dataclass(frozen=True, slots=True)
class Recalled:
    """No copy into the request's blocks runs, none will start."""

    key: RequestKey


OfferLinkEvent: TypeAlias = LinkUp | LinkLost | FromPuller
PullLinkEvent: TypeAlias = LinkUp | LinkLost | LinkFailed | FromOfferer | FetchDone | Recalled


class LinkEnd(Generic[In, Out]):
    """Our end of a link whose handshake is done.

    held: what we hold for the peer; whoever passes messages through this end keeps it true (handoff.py).
    wrap: makes a message of a Renew.
    """

    def __init__(self, lease_s: float, wrap: Callable[[transfer_pb2.Renew], Out]) -> None:
        self.held: set[RequestKey] = set()
        self._lease_s = lease_s
        self._wrap = wrap
        self._unsent: asyncio.Queue[Out] = asyncio.Queue(MAX_UNSENT)
        self._closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def send(self, message: Out) -> None:
        try:
            self._unsent.put_nowait(message)
        except asyncio.QueueFull:
            self.close(f"the peer left {MAX_UNSENT} messages unread")

    def close(self, why: str) -> None:
        """Ends `run`; what is not sent stays unsent."""
        if not self._closed.done():
            self._closed.set_result(why)

    async def run(self, stream: Any, receive: Callable[[In], None]) -> str:
        """Pass messages both ways until the link ends; says why it did. The caller ends the call itself.

        stream: a client's call or a server's context; both have `read` and `write`, and no common type.
        """
        reader = asyncio.create_task(self._read(stream, receive))
        writer = asyncio.create_task(self._write(stream))
        try:
            done, _ = await asyncio.wait([reader, writer, self._closed], return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        except grpc.aio.AioRpcError as error:
            return f"the connection broke: {error.code().name} {error.details()}"
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            return f"the connection broke: {error!r}"
        finally:
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _read(self, stream: Any, receive: Callable[[In], None]) -> str:
        while True:
            try:
                # Not wait_for, which in Python 3.11 may overlook that it is cancelled.
                async with asyncio.timeout(self._lease_s):
                    message = await stream.read()
            except TimeoutError:
                return f"the peer has been silent for {self._lease_s} s"
            if message is grpc.aio.EOF:
                return "the peer ended the link"
            receive(message)

    async def _write(self, stream: Any) -> str:
        loop = asyncio.get_running_loop()
        beat_s = loop.time() + self._lease_s / 4
        while True:
            if loop.time() >= beat_s:  # also when there is always something to send
                beat_s = loop.time() + self._lease_s / 4
                await stream.write(self._wrap(transfer_pb2.Renew(keys=map(wire_key, self.held))))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(beat_s):
                    message = await self._unsent.get()
                await stream.write(message)


def wire_key(key: RequestKey) -> transfer_pb2.HandoffKey:
    return transfer_pb2.HandoffKey(request_id=key.request_id, attempt=key.attempt)


def request_key(key: transfer_pb2.HandoffKey) -> RequestKey:
    return RequestKey(key.request_id, key.attempt)


def part_of(offer: transfer_pb2.Offer) -> Part:
    """As the cores take it."""
    return Part(
        offer.start_token,
        offer.end_token,
        offer.start_layer,
        offer.end_layer,
        tuple(offer.blocks),
        tuple(offer.generations),
        tuple(offer.digests),
    )


def failure_reason(reason: HandoffFailure) -> worker_pb2.FailureReason:
    """As routers are told."""
    return _FAILURE_REASONS[reason]
