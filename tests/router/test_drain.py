"""Workers that are to be empty, and such that change their role in the middle of a life."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest
from prelay.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, worker_pb2

from router.errors import WorkerRefusedError
from router.fake_holds import Hold
from router.pool_view import Role
from router.worker_link import Registration

DECODE, MIXED = worker_pb2.ROLE_DECODE, worker_pb2.ROLE_MIXED
PROMPT = "tell me"


async def ask(cluster, max_tokens=9):
    sampling = inference_pb2.SamplingParams(max_tokens=max_tokens, temperature=0)
    async with cluster.grpc() as stub:
        call = stub.Generate(inference_pb2.GenerateRequest(text=PROMPT, sampling=sampling))
        messages = [message async for message in call]
    return "".join(message.text for message in messages), messages[-1].finish.details


async def drain(cluster, worker_id, epoch=1, *, draining=True):
    async with grpc.aio.insecure_channel(cluster.addresses.admin) as channel:
        request = admin_pb2.DrainWorkerRequest(worker_id=worker_id, epoch=epoch, draining=draining)
        answer = await admin_pb2_grpc.RouterAdminStub(channel).DrainWorker(request)
    return answer.live_requests


async def test_a_drained_worker_ends_what_it_has_and_gets_nothing_new(start_cluster):
    cluster = await start_cluster()
    other = await cluster.add(DECODE, "d1")
    cluster.router.workers.drain("d1", 1, draining=True)
    cluster.decode.hold(Hold.DECODE)
    first = asyncio.create_task(ask(cluster))
    await cluster.decode.waiting_at(Hold.DECODE)
    assert await drain(cluster, "d1", draining=False) == 0
    assert await drain(cluster, "d0") == 1
    _, details = await ask(cluster)
    assert details.decode_worker == "d1"
    cluster.decode.let_go(Hold.DECODE)
    text, details = await first
    assert (text, details.decode_worker, details.attempt) == (cluster.answer(PROMPT, 9), "d0", 1)
    assert await drain(cluster, "d0") == 0
    assert len(other.reserves) == 1
    async with grpc.aio.insecure_channel(cluster.addresses.admin) as channel:
        status = await admin_pb2_grpc.RouterAdminStub(channel).GetStatus(admin_pb2.GetStatusRequest())
    assert {worker.info.worker_id: worker.draining for worker in status.workers} == {
        "p0": False, "d0": True, "d1": False
    }  # fmt: skip
    await cluster.settled()


async def test_a_prefill_worker_is_not_empty_while_its_kv_travels(start_cluster):
    cluster = await start_cluster()
    cluster.decode.hold(Hold.TRANSFER)
    asking = asyncio.create_task(ask(cluster))
    await cluster.decode.waiting_at(Hold.TRANSFER)
    (live,) = cluster.router.dispatcher.live
    await cluster.until(lambda: len(live.record.token_ids) == 1)
    assert await drain(cluster, "p0") == 1
    cluster.decode.let_go(Hold.TRANSFER)
    await asking
    assert await drain(cluster, "p0") == 0


async def test_a_drain_outlives_a_stream_that_breaks(start_cluster):
    cluster = await start_cluster()
    await drain(cluster, "d0")
    cluster.decode.break_stream()
    await cluster.until(lambda: not cluster.router.pool["d0"].up)
    await cluster.register(cluster.decode)
    assert cluster.router.pool["d0"].draining


async def test_what_waits_for_a_drained_worker_goes_there_when_that_is_undone(start_cluster):
    cluster = await start_cluster()
    await drain(cluster, "d0")
    asking = asyncio.create_task(ask(cluster))
    await cluster.until(lambda: cluster.router.dispatcher.live.gated == 1)
    assert not cluster.decode.reserves
    await drain(cluster, "d0", draining=False)
    _, details = await asking
    assert details.decode_worker == "d0"


@pytest.mark.parametrize(("worker_id", "epoch"), [("d9", 1), ("d0", 2)])
async def test_only_a_life_that_is_attached_can_be_drained(start_cluster, worker_id, epoch):
    cluster = await start_cluster()
    with pytest.raises(grpc.aio.AioRpcError, match=f"no worker '{worker_id}' with epoch {epoch}"):
        await drain(cluster, worker_id, epoch)


async def test_a_decode_worker_becomes_mixed_and_back_in_one_life(start_cluster):
    cluster = await start_cluster()
    cluster.decode.hold(Hold.DECODE)
    first = asyncio.create_task(ask(cluster))
    await cluster.decode.waiting_at(Hold.DECODE)
    address = cluster.decode.info.address
    await cluster.router.workers.register(Registration("d0", 1, Role.MIXED, address))
    assert [worker.worker_id for worker in cluster.router.pool.up(Role.MIXED)] == ["d0"]
    assert cluster.sample("prelay_worker_up", role="mixed", worker="d0") == 1
    cluster.decode.let_go(Hold.DECODE)
    text, details = await first
    assert (text, details.attempt) == (cluster.answer(PROMPT, 9), 1), "it went on"
    await cluster.router.workers.register(Registration("d0", 1, Role.DECODE, address))
    assert not cluster.router.pool.up(Role.MIXED)
    _, details = await ask(cluster)
    assert details.prefill_worker == "p0"


async def test_a_reader_cannot_become_a_writer_in_one_life(start_cluster):
    cluster = await start_cluster()
    address = cluster.prefill.info.address
    with pytest.raises(WorkerRefusedError, match="as decode it must live anew, with a greater epoch"):
        await cluster.router.workers.register(Registration("p0", 1, Role.DECODE, address))


async def test_the_controller_is_told_to_who_asks(start_cluster):
    cluster = await start_cluster()
    async with grpc.aio.insecure_channel(cluster.addresses.admin) as channel:
        stub = admin_pb2_grpc.RouterAdminStub(channel)
        assert (await stub.GetStatus(admin_pb2.GetStatusRequest())).controller == ""
        await stub.SetController(admin_pb2.SetControllerRequest(address="10.0.0.1:99"))
        assert (await stub.GetStatus(admin_pb2.GetStatusRequest())).controller == "10.0.0.1:99"
