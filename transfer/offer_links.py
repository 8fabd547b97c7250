"""The prefill worker's ends of its links: the KvTransfer service that decode workers dial."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any

import grpc
from prelay.v1 import transfer_pb2, transfer_pb2_grpc

from engine.sequence import RequestKey
from transfer.errors import PeerMismatchError
from transfer.handoff import LinkId, Offered, Peer
from transfer.handshake import check_fits, choose_backend
from transfer.link import FromPuller, LinkEnd, LinkLost, LinkUp, OfferLinkEvent, request_key, wire_key

_log = logging.getLogger(__name__)

_End = LinkEnd[transfer_pb2.PullerMessage, transfer_pb2.OffererMessage]


class OfferLinks(transfer_pb2_grpc.KvTransferServicer):
    """Everything here runs in the asyncio thread; what happens is told through `post`.

    handshake: ours, with all backends that we serve. A link that is refused or never shakes hands is not
    told of.
    """

    def __init__(
        self,
        handshake: transfer_pb2.Handshake,
        lease_s: float,
        post: Callable[[OfferLinkEvent], None],
        clock: Callable[[], float],
    ) -> None:
        self._handshake = handshake
        self._lease_s = lease_s
        self._post = post
        self._clock = clock
        self._ids = itertools.count(1)
        self._ends: dict[LinkId, tuple[Peer, _End]] = {}
        self._stopping = False

    async def Link(self, request_iterator: object, context: Any) -> None:
        """One link, from handshake to end."""
        if self._stopping:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the worker is stopping")
        theirs = await self._shake_hands(context)
        peer, link = Peer(theirs.worker_id, theirs.epoch), next(self._ids)
        end = _End(self._lease_s, wrap=lambda renew: transfer_pb2.OffererMessage(renew=renew))
        self._replace(peer)
        self._ends[link] = (peer, end)
        # Told before the puller knows: what it may cause, it causes to a link that is known.
        self._post(LinkUp(link, peer))
        _log.info("event=link_up link=%d peer=%s", link, peer)
        why = "the call was cancelled"
        try:
            await context.write(self._answer(theirs))
            why = await end.run(context, lambda message: self._receive(link, end, message))
        finally:
            del self._ends[link]
            self._post(LinkLost(link, why))
            _log.info("event=link_lost link=%d peer=%s why=%r", link, peer, why)
        await context.abort(grpc.StatusCode.CANCELLED, why)

    def promise(self, peer: Peer, key: RequestKey) -> None:
        """The prompt has arrived: from now on the peer hears that it is here. The engine, when it comes to
        it, offers or withdraws it."""
        for of, end in self._ends.values():
            if of == peer:
                end.held.add(key)

    def send_offer(self, link: LinkId, offered: Offered) -> None:
        """To nobody, if the link has ended: its end is told of separately."""
        if (found := self._ends.get(link)) is not None:
            offer = transfer_pb2.Offer(
                key=wire_key(offered.key),
                num_tokens=offered.num_tokens,
                first_token=offered.first_token,
                blocks=offered.blocks,
                generations=offered.generations,
            )
            found[1].send(transfer_pb2.OffererMessage(offer=offer))

    def send_withdraw(self, link: LinkId, key: RequestKey) -> None:
        """To nobody, if the link has ended."""
        if (found := self._ends.get(link)) is not None:
            found[1].held.discard(key)
            found[1].send(transfer_pb2.OffererMessage(withdraw=wire_key(key)))

    def close(self, link: LinkId, why: str) -> None:
        if (found := self._ends.get(link)) is not None:
            found[1].close(why)

    def stop(self) -> None:
        """Close all links and take no new ones."""
        self._stopping = True
        for link in list(self._ends):
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
            choose_backend(self._handshake, theirs)
        except PeerMismatchError as error:
            _log.warning(
                "event=handshake_refused peer=%s@%d why=%r", theirs.worker_id, theirs.epoch, str(error)
            )
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        newest = max((p.epoch for p, _ in self._ends.values() if p.worker_id == theirs.worker_id), default=0)
        if theirs.epoch < newest:
            message = f"epoch: {theirs.worker_id}@{theirs.epoch} has been replaced by epoch {newest}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, message)
        return theirs

    def _answer(self, theirs: transfer_pb2.Handshake) -> transfer_pb2.OffererMessage:
        answer = transfer_pb2.Handshake()
        answer.CopyFrom(self._handshake)
        del answer.backends[:]
        answer.backends.append(choose_backend(self._handshake, theirs))
        return transfer_pb2.OffererMessage(handshake=answer)

    def _replace(self, peer: Peer) -> None:
        for link, (old, _) in list(self._ends.items()):
            if old.worker_id == peer.worker_id:
                self.close(link, f"{peer} opened a new link")
