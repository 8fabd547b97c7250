"""The worker's end of Worker.Attach against a real gRPC client, without an engine behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from typing import Any

import grpc
import pytest
from prelay.v1 import worker_pb2, worker_pb2_grpc

from engine import router_stream
from engine.block_changes import BlockChanges
from engine.latency import StepShape
from engine.router_messages import Command, Load, Outbox, Owner, RouterEvent, RouterGone
from engine.router_stream import RouterStreams
from engine.sequence import RequestKey, StopReason

INFO = worker_pb2.WorkerInfo(worker_id="decode-0", epoch=3, protocol_version=1)
IDLE = Load(0, 0, 0, 8, 0, 0)
BUSY = Load(1, 2, 3, 4, 2, 2)


class Worker:
    """RouterStreams on a server; events are kept."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[RouterEvent] = asyncio.Queue()
        self.now = 0.0
        self.streams = RouterStreams(
            INFO, 0.01, self.events.put_nowait, IDLE, lambda: self.now, hello_timeout_s=0.3
        )
        self.server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(self.streams, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"

    async def owner(self, router: Router) -> Owner:
        """The stream as the engine knows it."""
        await router.send(cancel=worker_pb2.Cancel(request_id="unknown"))
        event = await self.events.get()
        assert isinstance(event, Command)
        return event.owner


class Router:
    def __init__(self, worker: Worker) -> None:
        self._channel = grpc.aio.insecure_channel(worker.address)
        self.call = worker_pb2_grpc.WorkerStub(self._channel).Attach()
        self._seq = 0

    async def send(self, **message: Any) -> None:
        self._seq += 1
        await self.call.write(worker_pb2.RouterMessage(seq=self._seq, **message))

    async def attach(self, router_id: str = "r", protocol_version: int = 1, epoch: int = 3) -> Any:
        hello = worker_pb2.RouterHello(router_id=router_id, protocol_version=protocol_version, epoch=epoch)
        await self.send(hello=hello)
        return await self.call.read()

    async def read(self, kind: str) -> Any:
        async with asyncio.timeout(10):
            while True:
                message = await self.call.read()
                if message.HasField(kind):
                    return getattr(message, kind)

    async def close(self) -> None:
        self.call.cancel()
        await self._channel.close()


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    made = Worker()
    await made.server.start()
    yield made
    await made.server.stop(grace=0)


@pytest.fixture
async def router(worker: Worker) -> AsyncIterator[Router]:
    made = Router(worker)
    yield made
    await made.close()


async def test_hello_both_ways_then_commands_in_order_with_the_time_they_came(
    worker: Worker, router: Router
) -> None:
    assert (await router.attach()).hello == INFO
    commands = []
    for i in range(3):
        worker.now = 10.0 + i
        await router.send(cancel=worker_pb2.Cancel(request_id=str(i)))
        command = await worker.events.get()
        assert isinstance(command, Command)
        commands.append((command.message.seq, command.message.cancel.request_id, command.arrived_s))
    assert commands == [(2, "0", 10.0), (3, "1", 11.0), (4, "2", 12.0)]


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        ({"protocol_version": 2}, "protocol_version: router has 2, worker has 1"),
        ({"epoch": 2}, "epoch: decode-0 lives epoch 3, the router means 2"),
    ],
)
async def test_a_hello_that_does_not_fit_is_refused(
    router: Router, hello: dict[str, Any], message: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await router.attach(**hello)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert refused.value.details() == message


async def test_a_stream_without_hello_is_refused(router: Router) -> None:
    await router.send(cancel=worker_pb2.Cancel())
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await router.call.read()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_stream_that_never_says_hello_is_ended(worker: Worker, router: Router) -> None:
    await router.call.wait_for_connection()
    async with asyncio.timeout(10):
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await router.call.read()
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert ended.value.details() == "no hello within 0.3 s"
    assert worker.events.empty()


@pytest.mark.parametrize("how", ["cancel", "half-close"])
async def test_the_end_of_a_stream_is_told_after_its_commands(
    worker: Worker, router: Router, how: str
) -> None:
    await router.attach()
    owner = await worker.owner(router)
    if how == "cancel":
        router.call.cancel()
    else:
        await router.call.done_writing()
    assert await worker.events.get() == RouterGone(owner)
    worker.streams.deliver(Outbox().take(BUSY))


async def test_snapshots_come_on_a_beat_with_the_figures_that_the_engine_told(
    worker: Worker, router: Router
) -> None:
    await router.attach()
    first = await router.read("snapshot")
    assert (first.seq, first.commands_seen, first.free_blocks) == (1, 1, 8)
    owner = await worker.owner(router)
    waiting = await router.read("snapshot")
    assert waiting.commands_seen == 1, "the engine has not said that it has seen the command"
    outbox = Outbox()
    outbox.seen(Command(owner, worker_pb2.RouterMessage(seq=2), 0.0))
    worker.streams.deliver(outbox.take(BUSY))
    while (now := await router.read("snapshot")).commands_seen == 1:
        assert now.free_blocks == 8
    assert (now.running_requests, now.queue_requests, now.queue_tokens) == (1, 2, 3)
    assert (now.free_blocks, now.owned_blocks, now.leased_blocks) == (4, 2, 2)


async def test_a_snapshot_tells_of_decoding_and_of_the_steps_since_the_last_one(
    worker: Worker, router: Router
) -> None:
    await router.attach()
    await worker.owner(router)
    outbox = Outbox()
    outbox.stepped(StepShape(((5, 16),), 2, 90), 0.5)
    busy = replace(BUSY, decoding_requests=2, decode_context=90, least_tpot_s=0.125, ahead_s=0.5)
    worker.streams.deliver(outbox.take(busy))
    while not (now := await router.read("snapshot")).steps:
        pass
    assert (now.decoding_requests, now.decode_context) == (2, 90)
    assert (now.least_tpot_s, now.ahead_s) == (0.125, 0.5)
    (step,) = now.steps
    assert (list(step.new_tokens), list(step.cached_tokens), step.seconds) == ([5], [16], 0.5)
    assert not (await router.read("snapshot")).steps
    assert not outbox.take(busy).steps


async def test_whenever_a_router_attaches_it_knows_what_is_cached(worker: Worker, router: Router) -> None:
    await router.attach("early")
    deliver = worker.streams.deliver
    deliver(Outbox().take(BUSY, BlockChanges((1, 2, 3))))
    assert await told(router, 3) == {1, 2, 3}
    deliver(Outbox().take(BUSY, BlockChanges((4,), (2,))))
    late = Router(worker)
    await late.attach("late")
    first = await late.call.read()
    assert [list(event.stored) for event in first.blocks.events] == [[1, 3, 4]]
    assert await told(router, 2, {1, 2, 3}) == {1, 3, 4}
    deliver(Outbox().take(BUSY, BlockChanges((5,), (1,))))
    assert await told(late, 2, {1, 3, 4}) == await told(router, 2, {1, 3, 4}) == {3, 4, 5}
    await late.close()


async def test_changes_that_come_before_they_are_sent_are_told_together(
    worker: Worker, router: Router
) -> None:
    await router.attach()
    for digest in range(100):  # the writer does not get a turn
        changes = BlockChanges((digest,), (digest - 1,) if digest else ())
        worker.streams.deliver(Outbox().take(BUSY, changes))
    (event,) = (await router.read("blocks")).events
    assert (list(event.stored), list(event.removed)) == ([99], [])


async def told(router: Router, num_changes: int, known: Iterable[int] = ()) -> set[int]:
    """What is cached after so many more changes, each of which must be one."""
    known = set(known)
    while num_changes:
        for event in (await router.read("blocks")).events:
            assert not known & set(event.stored)
            assert known >= set(event.removed)
            known = (known | set(event.stored)) - set(event.removed)
            num_changes -= len(event.stored) + len(event.removed)
    return known


async def test_a_step_is_one_message_for_each_router(worker: Worker, router: Router) -> None:
    await router.attach("one")
    other = Router(worker)
    await other.attach("two")
    one, two = await worker.owner(router), await worker.owner(other)
    outbox = Outbox()
    a, b = one.key("a", 0), one.key("b", 1)
    outbox.token(one, a, 3, 30, None, None)
    outbox.token(two, two.key("a", 0), 0, 31, None, worker_pb2.StageTimes(prefill_s=2.0))
    outbox.token(one, b, 4, 32, StopReason.STOP, None)
    outbox.failed(one, one.key("c", 0), worker_pb2.FAILURE_REASON_NO_BLOCKS, "none left")
    worker.streams.deliver(outbox.take(BUSY))
    failed = await router.read("failed")
    assert (failed.request_id, failed.message) == ("c", "none left")
    step = await router.read("step")
    assert [
        (s.request_id, s.attempt, s.first_index, list(s.token_ids), s.stop_reason) for s in step.sequences
    ] == [
        ("a", 0, 3, [30], worker_pb2.STOP_REASON_UNSPECIFIED),
        ("b", 1, 4, [32], worker_pb2.STOP_REASON_STOP),
    ]
    assert not step.sequences[0].HasField("times")
    (theirs,) = (await other.read("step")).sequences
    assert (theirs.request_id, theirs.times.prefill_s) == ("a", 2.0)
    assert outbox.take(IDLE).messages == {}
    await other.close()


def test_the_same_id_from_two_routers_is_two_requests() -> None:
    one, two = Owner(1, "one"), Owner(2, "two")
    assert one.key("x/y", 0) != two.key("x/y", 0)
    assert one.request_id(one.key("x/y", 0)) == "x/y"
    assert one.key("x", 1) == RequestKey("one/x", 1)


async def test_a_router_that_does_not_read_is_cut_off(
    worker: Worker, router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_stream, "MAX_UNSENT", 50)
    await router.attach()
    owner = await worker.owner(router)
    outbox = Outbox()
    text = "x" * 10_000
    for _ in range(1000):  # until flow control holds the writer and the rest piles up
        outbox.failed(owner, owner.key("a", 0), worker_pb2.FAILURE_REASON_INTERNAL, text)
        worker.streams.deliver(outbox.take(BUSY))
        for _ in range(100):  # the writer has all the time that it can use
            await asyncio.sleep(0)
        if not worker.events.empty():
            break
    assert await worker.events.get() == RouterGone(owner)
    with pytest.raises(grpc.aio.AioRpcError) as cut:
        await router.read("hello")
    assert cut.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_stop_ends_streams_and_refuses_new_ones(worker: Worker, router: Router) -> None:
    await router.attach()
    worker.streams.stop()
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await router.read("hello")
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    late = Router(worker)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await late.attach()
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    await late.close()
