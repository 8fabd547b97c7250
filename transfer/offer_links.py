"""The prefill worker's ends of its links: the KvTransfer service that decode workers dial."""

from __future__ import annotations

import asyncio
import itertools
import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from prelay.v1 import transfer_pb2, transfer_pb2_grpc

from engine.sequence import RequestKey
from transfer.base import Backend, KvMemory
from transfer.digest import digests_of
from transfer.errors import PeerMismatchError, TransferError
from transfer.handoff import LinkId, Peer
from transfer.handshake import check_fits, choose_backend, layout_of
from transfer.layout import Part, Route
from transfer.link import FromPuller, LinkEnd, LinkLost, LinkUp, OfferLinkEvent, request_key, wire_key

_log = logging.getLogger(__name__)

_End = LinkEnd[transfer_pb2.PullerMessage, transfer_pb2.OffererMessage]


@dataclass(frozen=True, slots=True)
class _Opened:
    """A link whose handshake is done. digest_share: the higher of both sides'."""

    peer: Peer
    end: _End
    route: Route
    digest_share: float


class OfferLinks(transfer_pb2_grpc.KvTransferServicer):
    """Everything here runs in the asyncio thread; what happens is told through `post`.

    handshake: ours, with all backends that we serve. memory: ours. A link that is refused or never shakes
    hands is not told of.
    """

    def __init__(
        self,
        handshake: transfer_pb2.Handshake,
        memory: KvMemory,
        backends: Sequence[Backend],
        lease_s: float,
        post: Callable[[OfferLinkEvent], None],
        clock: Callable[[], float],
    ) -> None:
        self._handshake = handshake
        self._memory = memory
        self._backends = backends
        self._lease_s = lease_s
        self._post = post
        self._clock = clock
        self._ids = itertools.count(1)
        self._links: dict[LinkId, _Opened] = {}
        self._stopping = False

    async def Link(self, request_iterator: object, context: Any) -> None:
        """One link, from handshake to end."""
        if self._stopping:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the worker is stopping")
        theirs = await self._shake_hands(context)
        peer, link = Peer(theirs.worker_id, theirs.epoch), next(self._ids)
        backend, answer = await self._offer(link, theirs, context)
        end = _End(self._lease_s, wrap=lambda renew: transfer_pb2.OffererMessage(renew=renew))
        self._replace(peer)
        share = max(self._handshake.digest_share, theirs.digest_share)
        self._links[link] = _Opened(peer, end, Route(self._memory.layout, layout_of(theirs)), share)
        # Told before the puller knows: what it may cause, it causes to a link that is known.
        self._post(LinkUp(link, peer, backend.name))
        _log.info("event=link_up link=%d peer=%s backend=%s", link, peer, backend.name)
        why = "the call was cancelled"
        try:
            await context.write(transfer_pb2.OffererMessage(handshake=answer))
            why = await end.run(context, lambda message: self._receive(link, end, message))
        finally:
            del self._links[link]
            backend.end_offer(link)
            self._post(LinkLost(link, why))
            _log.info("event=link_lost link=%d peer=%s why=%r", link, peer, why)
        await context.abort(grpc.StatusCode.CANCELLED, why)

    def promise(self, peer: Peer, key: RequestKey) -> None:
        """The prompt has arrived: from now on the peer hears that it is here. The engine, when it comes to
        it, offers or withdraws it."""
        for opened in self._links.values():
            if opened.peer == peer:
                opened.end.held.add(key)

    def send_offer(self, link: LinkId, key: RequestKey, part: Part) -> None:
        """To nobody, if the link has ended: its end is told of separately."""
        if (opened := self._links.get(link)) is None:
            return
        sampled = _is_sampled(key, opened.digest_share)
        offer = transfer_pb2.Offer(
            key=wire_key(key),
            start_token=part.start_token,
            end_token=part.end_token,
            start_layer=part.start_layer,
            end_layer=part.end_layer,
            blocks=part.blocks,
            generations=part.generations,
            digests=digests_of(self._memory, opened.route, part) if sampled else (),
        )
        opened.end.send(transfer_pb2.OffererMessage(offer=offer))

    def send_complete(self, link: LinkId, key: RequestKey, num_tokens: int, first_token: int) -> None:
        """To nobody, if the link has ended."""
        if (opened := self._links.get(link)) is not None:
            complete = transfer_pb2.Complete(
                key=wire_key(key), num_tokens=num_tokens, first_token=first_token
            )
            opened.end.send(transfer_pb2.OffererMessage(complete=complete))

    def send_withdraw(self, link: LinkId, key: RequestKey) -> None:
        """To nobody, if the link has ended."""
        if (opened := self._links.get(link)) is not None:
            opened.end.held.discard(key)
            opened.end.send(transfer_pb2.OffererMessage(withdraw=wire_key(key)))

    def close(self, link: LinkId, why: str) -> None:
        if (opened := self._links.get(link)) is not None:
            opened.end.close(why)

    def stop(self) -> None:
        """Close all links and take no new ones."""
        self._stopping = True
        for link in list(self._links):
            self.close(link, "the worker is stopping")

    def _receive(self, link: LinkId, end: _End, message: transfer_pb2.PullerMessage) -> None:
        match message.WhichOneof("message"):
            case "renew" if not message.renew.keys:
                return  # the link's own sign of life: an idle engine sleeps through it
            case "acknowledge":
                end.held.discard(request_key(message.acknowledge))
            case "drop":
                end.held.discard(request_key(message.drop))
        self._post(FromPuller(link, message, self._clock()))

    async def _shake_hands(self, context: Any) -> transfer_pb2.Handshake:
        try:
            first = await asyncio.wait_for(context.read(), self._lease_s)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no handshake within {self._lease_s} s")
        if first is grpc.aio.EOF or first.WhichOneof("message") != "handshake":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be the handshake")
        theirs: transfer_pb2.Handshake = first.handshake
        try:
            check_fits(self._handshake, theirs)
        except PeerMismatchError as error:
            await self._refuse(context, theirs, str(error))
        newest = max(
            (
                opened.peer.epoch
                for opened in self._links.values()
                if opened.peer.worker_id == theirs.worker_id
            ),
            default=0,
        )
        if theirs.epoch < newest:
            message = f"epoch: {theirs.worker_id}@{theirs.epoch} has been replaced by epoch {newest}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, message)
        return theirs

    async def _offer(
        self, link: LinkId, theirs: transfer_pb2.Handshake, context: Any
    ) -> tuple[Backend, transfer_pb2.Handshake]:
        """The backend that is chosen, and our handshake, which says how the puller uses it."""
        answer = transfer_pb2.Handshake()
        answer.CopyFrom(self._handshake)
        try:
            backend = choose_backend(self._backends, self._handshake.worker_id, theirs)
            answer.backends[:] = [backend.name]
            backend.offer(link, theirs, answer)
        except TransferError as error:
            await self._refuse(context, theirs, str(error))
            raise
        return backend, answer

    async def _refuse(self, context: Any, theirs: transfer_pb2.Handshake, why: str) -> None:
        _log.warning("event=handshake_refused peer=%s@%d why=%r", theirs.worker_id, theirs.epoch, why)
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, why)

    def _replace(self, peer: Peer) -> None:
        for link, old in list(self._links.items()):
            if old.peer.worker_id == peer.worker_id:
                self.close(link, f"{peer} opened a new link")


def _is_sampled(key: RequestKey, share: float) -> bool:
    """The same for all parts of a request."""
    return zlib.crc32(f"{key.request_id}/{key.attempt}".encode()) < share * 2**32
