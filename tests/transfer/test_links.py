"""Both ends of links over real gRPC, without engines: what is told, in which order, and how links end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import grpc
import pytest
from prelay.v1 import transfer_pb2, transfer_pb2_grpc, worker_pb2

from engine.layout import KvLayout
from engine.sequence import RequestKey
from transfer.handoff import Fetch, HandoffFailure, Offered, Peer
from transfer.handshake import our_handshake
from transfer.ipc import SharedSegment
from transfer.link import (
    FetchDone,
    FromOfferer,
    FromPuller,
    LinkFailed,
    LinkLost,
    LinkUp,
    PullLinkEvent,
    request_key,
    wire_key,
)
from transfer.memory import MemoryBackend
from transfer.offer_links import OfferLinks
from transfer.pull_links import PullLinks

LAYOUT = KvLayout(1, 1, 4, 4, "float32")
KEY, OTHER = RequestKey("a", 1), RequestKey("b", 1)
OFFER = Offered(KEY, 5, 9, (1, 0), (0, 0))
LEASE_S = 0.4

Event = TypeVar("Event")


def handshake(worker_id: str, epoch: int = 1, backends: tuple[str, ...] = ("memory",)) -> Any:
    info = worker_pb2.WorkerInfo(worker_id=worker_id, epoch=epoch, protocol_version=1)
    return our_handshake(info, LAYOUT, backends, None)


class Ends:
    """One offering worker on a server; pulling workers as a test wants them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.source = SharedSegment.create(LAYOUT, 4, 1)
        self.target = SharedSegment.create(LAYOUT, 4, 1)
        self.offerer_heard: asyncio.Queue[Any] = asyncio.Queue()
        self.puller_heard: asyncio.Queue[Any] = asyncio.Queue()
        self.offers = OfferLinks(
            handshake("prefill-0"), LEASE_S, self.offerer_heard.put_nowait, lambda: self.now
        )
        self.server = grpc.aio.server()
        transfer_pb2_grpc.add_KvTransferServicer_to_server(self.offers, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.made: list[PullLinks] = []

    def puller(self, epoch: int = 1) -> PullLinks:
        loop = asyncio.get_running_loop()
        heard = self.puller_heard.put_nowait

        def post(event: PullLinkEvent) -> None:
            loop.call_soon_threadsafe(heard, event)

        links = PullLinks(
            handshake("decode-0", epoch),
            {"memory": lambda theirs: MemoryBackend(self.source, self.target)},
            LAYOUT.block_nbytes,
            LEASE_S,
            post,
            lambda: self.now,
        )
        self.made.append(links)
        return links

    async def up(self, puller: PullLinks) -> tuple[int, int]:
        """Numbers of a new link, as the offerer and as the puller know it."""
        puller.connect(Peer("prefill-0", 1), self.address)
        here = await next_of(self.offerer_heard, LinkUp)
        there = await next_of(self.puller_heard, LinkUp)
        assert there.peer == Peer("prefill-0", 1)
        return here.link, there.link


async def next_of(queue: asyncio.Queue[Any], kind: type[Event]) -> Event:
    async with asyncio.timeout(10):
        while not isinstance(event := await queue.get(), kind):
            pass
        return event


def renewed(message: transfer_pb2.OffererMessage | transfer_pb2.PullerMessage) -> set[RequestKey]:
    return set(map(request_key, message.renew.keys))


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    made = Ends()
    await made.server.start()
    yield made
    for links in made.made:
        await links.stop()
    made.offers.stop()
    await made.server.stop(grace=0)


async def test_messages_pass_both_ways_and_the_end_is_told_last(ends: Ends) -> None:
    puller = ends.puller()
    here, there = await ends.up(puller)
    ends.offers.send_offer(here, OFFER)
    offer = (await next_of(ends.puller_heard, FromOfferer)).message.offer
    assert (offer.key, offer.num_tokens, offer.first_token) == (wire_key(KEY), 5, 9)
    assert (list(offer.blocks), list(offer.generations)) == ([1, 0], [0, 0])
    puller.send_acknowledge(there, KEY)
    heard = await next_of(ends.offerer_heard, FromPuller)
    assert (heard.link, heard.message.acknowledge) == (here, wire_key(KEY))
    ends.offers.close(here, "enough")
    assert await next_of(ends.offerer_heard, LinkLost) == LinkLost(here, "enough")
    assert (await next_of(ends.puller_heard, LinkLost)).link == there
    # To a link that has ended: nothing happens.
    ends.offers.send_offer(here, OFFER)
    puller.send_drop(there, KEY)


async def test_a_fetch_copies_and_reports_also_after_the_link_has_ended(ends: Ends) -> None:
    puller = ends.puller()
    _, there = await ends.up(puller)
    ends.source.blocks[:2] = [[1], [2]]
    puller.fetch(Fetch(there, OFFER, (2, 3)))
    done = await next_of(ends.puller_heard, FetchDone)
    assert (done.key, done.backend, done.num_bytes, done.error) == (
        KEY,
        "memory",
        2 * LAYOUT.block_nbytes,
        None,
    )
    assert ends.target.blocks[:, 0].tolist() == [0, 0, 2, 1]
    ends.source.generations[1] += 1
    puller.fetch(Fetch(there, OFFER, (2, 3)))
    assert "were recycled" in ((await next_of(ends.puller_heard, FetchDone)).error or "")
    puller.fetch(Fetch(999, OFFER, (2, 3)))
    assert "the link ended" in ((await next_of(ends.puller_heard, FetchDone)).error or "")


async def test_an_idle_link_stays_up_by_its_sign_of_life(ends: Ends) -> None:
    await ends.up(ends.puller())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(ends.offerer_heard.get(), 4 * LEASE_S)
    assert ends.puller_heard.empty(), "the sign of life is nothing that an engine should wake up for"


async def test_the_beat_renews_a_promise_until_it_is_withdrawn_or_answered(ends: Ends) -> None:
    """No engine says a word meanwhile: it may be in a step."""
    puller = ends.puller()
    here, there = await ends.up(puller)
    ends.offers.promise(Peer("decode-0", 2), RequestKey("of another life", 0))
    ends.offers.promise(Peer("decode-0", 1), KEY)
    ends.offers.promise(Peer("decode-0", 1), OTHER)
    for now in (3.0, 4.0):
        ends.now = now
        while (heard := await next_of(ends.puller_heard, FromOfferer)).arrived_s < now:
            pass
        assert renewed(heard.message) == {KEY, OTHER}
    ends.offers.send_withdraw(here, OTHER)
    assert (await next_of(ends.puller_heard, FromOfferer)).message.withdraw == wire_key(OTHER)
    assert renewed((await next_of(ends.puller_heard, FromOfferer)).message) == {KEY}
    puller.send_drop(there, KEY)
    await next_of(ends.offerer_heard, FromPuller)
    assert not ends.offers._ends[here][1].held


@pytest.mark.parametrize("answer", ["acknowledge", "drop"])
async def test_the_beat_renews_an_offer_from_its_arrival_until_the_answer(ends: Ends, answer: str) -> None:
    puller = ends.puller()
    here, there = await ends.up(puller)
    ends.offers.promise(Peer("decode-0", 1), KEY)
    ends.offers.send_offer(here, OFFER)
    for now in (3.0, 4.0):
        ends.now = now
        while (heard := await next_of(ends.offerer_heard, FromPuller)).arrived_s < now:
            pass
        assert renewed(heard.message) == {KEY}
    getattr(puller, f"send_{answer}")(there, KEY)
    while renewed((heard := await next_of(ends.offerer_heard, FromPuller)).message):
        pass
    assert heard.message.WhichOneof("message") == answer
    assert not puller._ends[there].held
    assert not ends.offers._ends[here][1].held


async def test_the_beat_does_not_wait_for_a_pause(ends: Ends) -> None:
    """A link on which there is always something to send renews all the same."""
    here, _ = await ends.up(ends.puller())
    ends.offers.promise(Peer("decode-0", 1), KEY)
    end = ends.offers._ends[here][1]
    message = transfer_pb2.OffererMessage(withdraw=wire_key(OTHER))
    async with asyncio.timeout(10):
        while True:
            while end._unsent.qsize() < 10:
                end.send(message)
            heard = await next_of(ends.puller_heard, FromOfferer)
            if heard.message.HasField("renew"):
                break
    assert renewed(heard.message) == {KEY}


async def test_a_silent_puller_is_given_up(ends: Ends) -> None:
    async with grpc.aio.insecure_channel(ends.address) as channel:
        call = transfer_pb2_grpc.KvTransferStub(channel).Link()
        await call.write(transfer_pb2.PullerMessage(handshake=handshake("decode-0")))
        up = await next_of(ends.offerer_heard, LinkUp)
        assert await next_of(ends.offerer_heard, LinkLost) == LinkLost(
            up.link, f"the peer has been silent for {LEASE_S} s"
        )


async def test_a_silent_offerer_is_given_up(ends: Ends) -> None:
    class Silent(transfer_pb2_grpc.KvTransferServicer):
        async def Link(self, request_iterator: object, context: Any) -> None:
            await context.read()
            await context.write(transfer_pb2.OffererMessage(handshake=handshake("prefill-0")))
            await asyncio.Event().wait()

    server = grpc.aio.server()
    transfer_pb2_grpc.add_KvTransferServicer_to_server(Silent(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    ends.puller().connect(Peer("prefill-0", 1), address)
    up = await next_of(ends.puller_heard, LinkUp)
    lost = await next_of(ends.puller_heard, LinkLost)
    assert lost == LinkLost(up.link, f"the peer has been silent for {LEASE_S} s")
    await server.stop(grace=0)


async def test_a_new_link_of_the_same_worker_ends_the_old_one(ends: Ends) -> None:
    first, _ = await ends.up(ends.puller(epoch=1))
    ends.puller(epoch=2).connect(Peer("prefill-0", 1), ends.address)
    assert (await next_of(ends.offerer_heard, LinkUp)).peer == Peer("decode-0", 2)
    assert (await next_of(ends.offerer_heard, LinkLost)).link == first


async def test_an_earlier_life_is_refused_while_a_later_one_is_linked(ends: Ends) -> None:
    await ends.up(ends.puller(epoch=2))
    ends.puller(epoch=1).connect(Peer("prefill-0", 1), ends.address)
    failed = await next_of(ends.puller_heard, LinkFailed)
    assert failed.reason is HandoffFailure.PEER_MISMATCH
    assert failed.message == "epoch: decode-0@1 has been replaced by epoch 2"


async def test_a_link_begins_with_a_handshake(ends: Ends) -> None:
    async with grpc.aio.insecure_channel(ends.address) as channel:
        call = transfer_pb2_grpc.KvTransferStub(channel).Link()
        await call.write(transfer_pb2.PullerMessage(renew=transfer_pb2.Renew()))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        call = transfer_pb2_grpc.KvTransferStub(channel).Link()
        await call.wait_for_connection()
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await call.read()
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_stopping_ends_links_and_refuses_new_ones(ends: Ends) -> None:
    await ends.up(ends.puller())
    ends.offers.stop()
    await next_of(ends.puller_heard, LinkLost)
    ends.puller().connect(Peer("prefill-0", 1), ends.address)
    failed = await next_of(ends.puller_heard, LinkFailed)
    assert failed.reason is HandoffFailure.PEER_UNREACHABLE
    assert "the worker is stopping" in failed.message


async def test_memory_that_cannot_be_opened_is_told_whatever_the_reason(ends: Ends) -> None:
    def broken(theirs: transfer_pb2.Handshake) -> MemoryBackend:
        raise ZeroDivisionError("a defect")

    links = ends.puller()
    links._backends = {"memory": broken}
    links.connect(Peer("prefill-0", 1), ends.address)
    failed = await next_of(ends.puller_heard, LinkFailed)
    assert failed.reason is HandoffFailure.PEER_UNREACHABLE
    assert "a defect" in failed.message


async def test_a_backend_that_we_do_not_have_is_a_mismatch(ends: Ends) -> None:
    links = ends.puller()
    links._backends = {}
    links.connect(Peer("prefill-0", 1), ends.address)
    failed = await next_of(ends.puller_heard, LinkFailed)
    assert failed.reason is HandoffFailure.PEER_MISMATCH
    assert failed.message == "backends: prefill-0 chose memory, we can use []"
