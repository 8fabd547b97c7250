"""Both ends of links over real gRPC, without engines: what is told, in which order, and how links end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
import torch
from prelay.v1 import transfer_pb2, transfer_pb2_grpc, worker_pb2

from engine.sequence import RequestKey
from transfer.base import KvMemory
from transfer.errors import PeerUnreachableError, TransferError
from transfer.handoff import HandoffFailure, Lend, Peer
from transfer.handshake import our_handshake
from transfer.layout import Part, WorkerLayout
from transfer.link import (
    FetchDone,
    FromOfferer,
    FromPuller,
    LinkFailed,
    LinkLost,
    LinkUp,
    PullLinkEvent,
    Recalled,
    part_of,
    request_key,
    wire_key,
)
from transfer.memory import MemoryBackend
from transfer.offer_links import OfferLinks
from transfer.pull_links import PullLinks

LAYOUT = WorkerLayout(num_layers=1, num_kv_heads=1, head_dim=4, block_size=4, dtype="float32")
BLOCK_NBYTES = LAYOUT.rank(0).block_nbytes
NUM_BLOCKS = 4
KEY, OTHER = RequestKey("a", 1), RequestKey("b", 1)
PART = Part(0, 5, 0, 1, (1, 0), (0, 0))

SHORT_LEASE_S = 1.0
"""For what needs signs of life or their absence; all else must not depend on how fast a machine is."""

Event = TypeVar("Event")


def handshake(
    worker_id: str, epoch: int = 1, layout: WorkerLayout = LAYOUT, digest_share: float = 0.0
) -> transfer_pb2.Handshake:
    info = worker_pb2.WorkerInfo(worker_id=worker_id, epoch=epoch, protocol_version=1)
    return our_handshake(info, layout, ["memory"], digest_share)


def memory() -> KvMemory:
    blocks = torch.zeros(NUM_BLOCKS, BLOCK_NBYTES, dtype=torch.uint8)
    return KvMemory(LAYOUT, (blocks,), np.zeros(NUM_BLOCKS, np.uint32))


class Ends:
    """One offering worker on a server; pulling workers as a test wants them."""

    def __init__(self, lease_s: float) -> None:
        self.now = 0.0
        self.lease_s = lease_s
        self.source, self.target = memory(), memory()
        self.backend = MemoryBackend(self.target, {"prefill-0": self.source, "decode-0": self.target})
        self.offerer_heard: asyncio.Queue[Any] = asyncio.Queue()
        self.puller_heard: asyncio.Queue[Any] = asyncio.Queue()
        self.offers = OfferLinks(
            handshake("prefill-0"),
            self.source,
            [self.backend],
            lease_s,
            self.offerer_heard.put_nowait,
            lambda: self.now,
        )
        self.server = grpc.aio.server()
        transfer_pb2_grpc.add_KvTransferServicer_to_server(self.offers, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.made: list[PullLinks] = []

    def puller(self, epoch: int = 1, digest_share: float = 0.0) -> PullLinks:
        loop = asyncio.get_running_loop()
        heard = self.puller_heard.put_nowait

        def post(event: PullLinkEvent) -> None:
            loop.call_soon_threadsafe(heard, event)

        links = PullLinks(
            handshake("decode-0", epoch, digest_share=digest_share),
            self.target,
            [self.backend],
            self.lease_s,
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
        assert (here.backend, there.backend) == ("memory", "memory")
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
def lease_s() -> float:
    return 60.0


short_lease = pytest.mark.parametrize("lease_s", [SHORT_LEASE_S])


@pytest.fixture
async def ends(lease_s: float) -> AsyncIterator[Ends]:
    made = Ends(lease_s)
    await made.server.start()
    yield made
    for links in made.made:
        await links.stop()
    made.offers.stop()
    await made.server.stop(grace=0)


async def test_messages_pass_both_ways_and_the_end_is_told_last(ends: Ends) -> None:
    puller = ends.puller()
    here, there = await ends.up(puller)
    ends.offers.send_offer(here, KEY, PART)
    offer = (await next_of(ends.puller_heard, FromOfferer)).message.offer
    assert (offer.key, part_of(offer)) == (wire_key(KEY), PART)
    ends.offers.send_complete(here, KEY, 5, 9)
    complete = (await next_of(ends.puller_heard, FromOfferer)).message.complete
    assert (complete.key, complete.num_tokens, complete.first_token) == (wire_key(KEY), 5, 9)
    puller.send_acknowledge(there, KEY)
    heard = await next_of(ends.offerer_heard, FromPuller)
    assert (heard.link, heard.message.acknowledge) == (here, wire_key(KEY))
    ends.offers.close(here, "enough")
    assert await next_of(ends.offerer_heard, LinkLost) == LinkLost(here, "enough")
    assert (await next_of(ends.puller_heard, LinkLost)).link == there
    # To a link that has ended: nothing happens.
    ends.offers.send_offer(here, KEY, PART)
    ends.offers.send_complete(here, KEY, 5, 9)
    ends.offers.send_withdraw(here, KEY)
    puller.send_drop(there, KEY)
    puller.disconnect(there)


async def test_the_puller_can_end_a_link(ends: Ends) -> None:
    puller = ends.puller()
    here, there = await ends.up(puller)
    puller.disconnect(there)
    assert await next_of(ends.puller_heard, LinkLost) == LinkLost(there, "this life of the peer is over")
    assert (await next_of(ends.offerer_heard, LinkLost)).link == here


class Gate:
    """A copy that stands still until it is let go on."""

    def __init__(self, ends: Ends) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        ends.backend.before_copy = self._wait

    def _wait(self, part: Part) -> None:
        self.reached.set()
        assert self.open.wait(10)

    async def until_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 10)


async def test_a_copy_begins_when_its_offer_arrives_if_blocks_are_lent(ends: Ends) -> None:
    puller = ends.puller()
    here, there = await ends.up(puller)
    ends.source.ranks[0][:2] = torch.tensor([[1], [2]])
    ends.offers.send_offer(here, OTHER, PART)  # nothing is lent for it
    puller.lend(Lend(there, KEY, (2, 3), 0))
    ends.offers.send_offer(here, KEY, PART)
    done = await next_of(ends.puller_heard, FetchDone)
    assert (done.key, done.backend, done.error) == (KEY, "memory", None)
    assert (done.num_bytes, done.is_digest_good) == (2 * BLOCK_NBYTES, None)
    assert ends.target.ranks[0][:, 0].tolist() == [0, 0, 2, 1]
    ends.source.generations[1] += 1
    ends.offers.send_offer(here, KEY, PART)
    assert "were recycled" in ((await next_of(ends.puller_heard, FetchDone)).error or "")


async def test_what_the_puller_has_is_not_written(ends: Ends) -> None:
    puller = ends.puller()
    here, there = await ends.up(puller)
    ends.source.ranks[0][:2] = torch.tensor([[1], [2]])
    puller.lend(Lend(there, KEY, (2, 3), 4))
    ends.offers.send_offer(here, KEY, PART)
    assert (await next_of(ends.puller_heard, FetchDone)).num_bytes == BLOCK_NBYTES
    assert ends.target.ranks[0][:, 0].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("side", ["offerer", "puller"])
async def test_other_bytes_than_were_offered_are_found_by_their_digest(ends: Ends, side: str) -> None:
    """The higher share of both sides counts."""
    if side == "offerer":
        ends.offers._handshake.digest_share = 1.0
    puller = ends.puller(digest_share=1.0 if side == "puller" else 0.0)
    here, there = await ends.up(puller)
    puller.lend(Lend(there, KEY, (2, 3), 0))
    ends.offers.send_offer(here, KEY, PART)
    done = await next_of(ends.puller_heard, FetchDone)
    assert (done.error, done.is_digest_good) == (None, True)

    def spoil(part: Part) -> None:
        ends.target.ranks[0][3, 7] = 1

    ends.backend.after_copy = spoil
    ends.offers.send_offer(here, KEY, PART)
    done = await next_of(ends.puller_heard, FetchDone)
    assert done.is_digest_good is False
    assert "block 3 holds other bytes" in (done.error or "")


async def test_recalled_follows_the_last_copy_and_none_begins_after_it(ends: Ends) -> None:
    puller, gate = ends.puller(), Gate(ends)
    here, there = await ends.up(puller)
    puller.lend(Lend(there, KEY, (2, 3), 0))
    for _ in range(2):
        ends.offers.send_offer(here, KEY, PART)
    await next_of(ends.puller_heard, FromOfferer)
    await next_of(ends.puller_heard, FromOfferer)
    await gate.until_reached()
    puller.recall(KEY)
    ends.offers.send_offer(here, KEY, PART)
    await next_of(ends.puller_heard, FromOfferer)
    gate.open.set()
    events: list[PullLinkEvent] = []
    while not events or not isinstance(events[-1], Recalled):
        async with asyncio.timeout(10):
            events.append(await ends.puller_heard.get())
    assert [type(event) for event in events if not isinstance(event, FromOfferer)] == [
        FetchDone,
        FetchDone,
        Recalled,
    ]
    puller.recall(OTHER)
    assert await next_of(ends.puller_heard, Recalled) == Recalled(OTHER)


async def test_after_a_stop_copies_are_waited_for(ends: Ends) -> None:
    puller, gate = ends.puller(), Gate(ends)
    here, there = await ends.up(puller)
    puller.lend(Lend(there, KEY, (2, 3), 0))
    ends.offers.send_offer(here, KEY, PART)
    await gate.until_reached()
    await puller.stop()
    assert not await puller.copies_end(0.01)
    gate.open.set()
    assert await puller.copies_end(10.0)


async def test_lending_ends_with_complete(ends: Ends) -> None:
    puller = ends.puller()
    here, there = await ends.up(puller)
    puller.lend(Lend(there, KEY, (2, 3), 0))
    ends.offers.send_complete(here, KEY, 5, 9)
    ends.offers.send_offer(here, KEY, PART)
    await next_of(ends.puller_heard, FromOfferer)
    await next_of(ends.puller_heard, FromOfferer)
    puller.recall(KEY)
    async with asyncio.timeout(10):
        while not isinstance(event := await ends.puller_heard.get(), Recalled):
            assert not isinstance(event, FetchDone)


async def test_a_copy_goes_on_when_its_link_has_ended(ends: Ends) -> None:
    puller, gate = ends.puller(), Gate(ends)
    here, there = await ends.up(puller)
    puller.lend(Lend(there, KEY, (2, 3), 0))
    ends.offers.send_offer(here, KEY, PART)
    await gate.until_reached()
    ends.offers.close(here, "enough")
    await next_of(ends.puller_heard, LinkLost)
    gate.open.set()
    assert (await next_of(ends.puller_heard, FetchDone)).error is None


async def test_a_copy_that_fails_fails_alone_and_a_peer_out_of_reach_ends_the_link(ends: Ends) -> None:
    puller = ends.puller()
    here, there = await ends.up(puller)
    puller.lend(Lend(there, KEY, (2, 3), 0))
    failures = iter([TransferError("no such block"), ZeroDivisionError("a defect"), None])

    def fail(part: Part) -> None:
        if (failure := next(failures)) is not None:
            raise failure

    ends.backend.before_copy = fail
    for wanted in ("no such block", "a defect", ""):
        ends.offers.send_offer(here, KEY, PART)
        error = (await next_of(ends.puller_heard, FetchDone)).error
        assert wanted in (error or "")
    ends.offers.send_offer(here, KEY, replace(PART, blocks=(1,)))
    assert "are offered in 1 blocks" in ((await next_of(ends.puller_heard, FetchDone)).error or "")
    failures = iter([PeerUnreachableError("prefill-0 is gone")])
    ends.offers.send_offer(here, KEY, PART)
    assert (await next_of(ends.puller_heard, FetchDone)).error == "prefill-0 is gone"
    assert await next_of(ends.puller_heard, LinkLost) == LinkLost(there, "prefill-0 is gone")


@short_lease
async def test_an_idle_link_stays_up_by_its_sign_of_life(ends: Ends) -> None:
    await ends.up(ends.puller())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(ends.offerer_heard.get(), 2 * SHORT_LEASE_S)
    assert ends.puller_heard.empty(), "the sign of life is nothing that an engine should wake up for"


@short_lease
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
    assert not ends.offers._links[here].end.held


@short_lease
@pytest.mark.parametrize("answer", ["acknowledge", "drop"])
async def test_the_beat_renews_an_offer_from_its_arrival_until_the_answer(ends: Ends, answer: str) -> None:
    puller = ends.puller()
    here, there = await ends.up(puller)
    ends.offers.promise(Peer("decode-0", 1), KEY)
    ends.offers.send_offer(here, KEY, PART)
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
    assert not ends.offers._links[here].end.held


@short_lease
async def test_the_beat_does_not_wait_for_a_pause(ends: Ends) -> None:
    """A link on which there is always something to send renews all the same."""
    here, _ = await ends.up(ends.puller())
    ends.offers.promise(Peer("decode-0", 1), KEY)
    end = ends.offers._links[here].end
    message = transfer_pb2.OffererMessage(withdraw=wire_key(OTHER))
    async with asyncio.timeout(10):
        while True:
            while end._unsent.qsize() < 10:
                end.send(message)
            heard = await next_of(ends.puller_heard, FromOfferer)
            if heard.message.HasField("renew"):
                break
    assert renewed(heard.message) == {KEY}


@short_lease
async def test_a_silent_puller_is_given_up(ends: Ends) -> None:
    async with grpc.aio.insecure_channel(ends.address) as channel:
        call = transfer_pb2_grpc.KvTransferStub(channel).Link()
        await call.write(transfer_pb2.PullerMessage(handshake=handshake("decode-0")))
        up = await next_of(ends.offerer_heard, LinkUp)
        assert await next_of(ends.offerer_heard, LinkLost) == LinkLost(
            up.link, f"the peer has been silent for {SHORT_LEASE_S} s"
        )


@short_lease
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
    await server.stop(grace=0)
    assert lost == LinkLost(up.link, f"the peer has been silent for {SHORT_LEASE_S} s")


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


@short_lease
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
    links = ends.puller()
    ends.backend.connect = None  # type: ignore[assignment,method-assign]
    links.connect(Peer("prefill-0", 1), ends.address)
    failed = await next_of(ends.puller_heard, LinkFailed)
    assert failed.reason is HandoffFailure.PEER_UNREACHABLE
    assert "'NoneType' object is not callable" in failed.message
    assert await next_of(ends.offerer_heard, LinkLost)


async def test_a_backend_that_we_do_not_have_is_a_mismatch(ends: Ends) -> None:
    links = ends.puller()
    links._backends = {}
    links.connect(Peer("prefill-0", 1), ends.address)
    failed = await next_of(ends.puller_heard, LinkFailed)
    assert failed.reason is HandoffFailure.PEER_MISMATCH
    assert failed.message == "backends: prefill-0 chose memory, we can use []"


async def test_a_puller_that_does_not_fit_hears_the_field_and_its_offerer_nothing(ends: Ends) -> None:
    links = ends.puller()
    links._handshake = handshake("decode-0", layout=replace(LAYOUT, num_layers=2))
    links.connect(Peer("prefill-0", 1), ends.address)
    failed = await next_of(ends.puller_heard, LinkFailed)
    assert failed.reason is HandoffFailure.PEER_MISMATCH
    assert failed.message == "layout.num_layers: 1 at prefill-0, 2 at decode-0"
    links._handshake = handshake("decode-9")  # whom the backend cannot reach
    links.connect(Peer("prefill-0", 1), ends.address)
    failed = await next_of(ends.puller_heard, LinkFailed)
    assert failed.reason is HandoffFailure.PEER_MISMATCH
    assert failed.message.startswith("backends: decode-9 can use ['memory'], prefill-0 serves ['memory']")
    assert ends.offerer_heard.empty()


async def test_another_life_at_the_address_is_not_the_peer(ends: Ends) -> None:
    ends.puller().connect(Peer("prefill-0", 2), ends.address)
    failed = await next_of(ends.puller_heard, LinkFailed)
    assert (failed.peer, failed.reason) == (Peer("prefill-0", 2), HandoffFailure.PEER_UNREACHABLE)
    assert "prefill-0@1 answers at the address of prefill-0@2" in failed.message
    await next_of(ends.offerer_heard, LinkLost)
