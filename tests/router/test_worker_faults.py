"""Workers that die, fall silent, refuse, come back, with one attempt for each request: nothing leaks."""

from __future__ import annotations

import asyncio
import socket

import grpc
import grpc.aio
import pytest
from prelay.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, worker_pb2

from router.errors import WorkerRefusedError, WorkerUnreachableError
from router.fake_holds import Hold
from router.worker_link import Registration

PROMPT = "tell me"
PREFILL, DECODE = worker_pb2.ROLE_PREFILL, worker_pb2.ROLE_DECODE
NO_BLOCKS = worker_pb2.FAILURE_REASON_NO_BLOCKS


async def ask(cluster, prompt=PROMPT, max_tokens=6):
    """(status code or None, message or text, finish) of one gRPC call."""
    sampling = inference_pb2.SamplingParams(max_tokens=max_tokens, temperature=0)
    async with cluster.grpc() as stub:
        call = stub.Generate(inference_pb2.GenerateRequest(text=prompt, sampling=sampling))
        try:
            messages = [message async for message in call]
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details(), None
    return None, "".join(message.text for message in messages), messages[-1].finish


def snapshot_number(cluster, worker_id):
    (link,) = [link for link in cluster.router.workers.links() if link.worker_id == worker_id]
    return link.last_snapshot.seq if link.last_snapshot else 0


def holder(cluster, hold):
    return cluster.prefill if hold in (Hold.PREFILL, Hold.FIRST_TOKEN) else cluster.decode


@pytest.mark.parametrize("hold", list(Hold))
@pytest.mark.parametrize("victim", ["p0", "d0"])
async def test_a_dead_worker_ends_what_depends_on_it(start_cluster, hold, victim):
    cluster = await start_cluster(max_attempts=1)
    holder(cluster, hold).hold(hold)
    asking = asyncio.create_task(ask(cluster))
    await holder(cluster, hold).waiting_at(hold)
    if hold is Hold.DECODE:
        # Not before the router, too, knows that the hand-off is over.
        tokens = "prelay_inter_token_latency_seconds_count"
        await cluster.until(lambda: cluster.sample(tokens, slo_class="default") > 0)
    (cluster.prefill if victim == "p0" else cluster.decode).break_stream()
    if (hold, victim) == (Hold.DECODE, "p0"):
        # The decode worker has everything: the prefill worker is no longer needed.
        await cluster.until(lambda: not cluster.router.pool["p0"].up)
        cluster.decode.let_go(hold)
        assert (await asking)[1] == cluster.answer(PROMPT, 6)
    else:
        code, message, _ = await asking
        assert code is grpc.StatusCode.UNAVAILABLE
        assert f"worker {victim} was lost" in message
    await cluster.settled()
    assert cluster.sample("prelay_worker_up", role=cluster.router.pool[victim].role, worker=victim) == 0


async def test_a_silent_worker_is_down(start_cluster):
    now = [0.0]
    cluster = await start_cluster(clock=lambda: now[0], liveness_timeout_s=6.0, max_attempts=1)
    cluster.decode.hold(Hold.DECODE)
    asking = asyncio.create_task(ask(cluster))
    await cluster.decode.waiting_at(Hold.DECODE)
    cluster.decode.fall_silent()
    silence = 0
    while cluster.router.pool["d0"].up:
        # The prefill worker's snapshots keep coming between the beats, the decode worker's do not.
        before = snapshot_number(cluster, "p0")
        await cluster.until(lambda seen=before: snapshot_number(cluster, "p0") > seen)
        now[0] += 1.0
        silence += 1
        cluster.router.workers.watch()
        assert silence < 20
    assert silence >= 6
    assert cluster.router.pool["p0"].up
    code, message, _ = await asking
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "no sign of life for 6 s" in message
    await cluster.settled()


async def test_a_pause_of_the_router_itself_kills_no_worker(start_cluster):
    now = [0.0]
    cluster = await start_cluster(clock=lambda: now[0], liveness_timeout_s=6.0)
    now[0] += 3600.0
    cluster.router.workers.watch()
    assert cluster.router.pool.missing_role() is None
    assert (await ask(cluster))[1] == cluster.answer(PROMPT, 6)


async def test_requests_at_the_gate_end_when_a_role_has_died_out(start_cluster):
    cluster = await start_cluster(decode={"num_blocks": 1}, recovery_wait_s=0.05)
    cluster.prefill.hold(Hold.PREFILL)
    asking = [asyncio.create_task(ask(cluster)) for _ in range(2)]
    await cluster.until(lambda: cluster.router.dispatcher.live.gated == 1)
    cluster.prefill.break_stream()
    for code, message, _ in await asyncio.gather(*asking):
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "no prefill worker is up" in message
    await cluster.settled()
    code, message, _ = await ask(cluster)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "no prefill worker is up" in message


async def test_a_request_that_fits_no_living_worker_does_not_block_the_gate(start_cluster):
    cluster = await start_cluster(decode={"num_blocks": 2}, max_attempts=1)
    large = await cluster.add(DECODE, "large", num_blocks=64)
    cluster.prefill.hold(Hold.PREFILL)
    fillers = [asyncio.create_task(ask(cluster, prompt="x" * 200)) for _ in range(6)]
    await cluster.until(lambda: len(cluster.router.dispatcher.live) == 6)
    small = asyncio.create_task(ask(cluster, prompt="hi", max_tokens=2))
    await cluster.until(lambda: len(cluster.router.dispatcher.live) == 7)
    assert cluster.router.dispatcher.live.gated > 1
    large.break_stream()
    codes = {(await filler)[0] for filler in fillers}
    assert codes == {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INVALID_ARGUMENT}
    cluster.prefill.let_go(Hold.PREFILL)
    assert (await small)[1] == cluster.answer("hi", 2)


async def test_the_other_pair_goes_on(start_cluster):
    cluster = await start_cluster(max_attempts=1)
    p1, d1 = await cluster.add(PREFILL, "p1"), await cluster.add(DECODE, "d1")
    cluster.decode.hold(Hold.DECODE)
    d1.hold(Hold.DECODE)
    asking = [asyncio.create_task(ask(cluster, prompt)) for prompt in ("one", "two")]
    await cluster.decode.waiting_at(Hold.DECODE)
    await d1.waiting_at(Hold.DECODE)
    cluster.decode.break_stream()
    d1.let_go(Hold.DECODE)
    answers = await asyncio.gather(*asking)
    assert sorted(code is None for code, _, _ in answers) == [False, True]
    assert (await ask(cluster, "three"))[1] == cluster.answer("three", 6)
    assert p1.received["prefill"] + cluster.prefill.received["prefill"] == 3
    await cluster.settled()


async def test_no_room_is_tried_again(cluster):
    cluster.decode.fail_next(NO_BLOCKS, NO_BLOCKS)
    _, text, finish = await ask(cluster)
    assert text == cluster.answer(PROMPT, 6)
    assert finish.details.attempt == 3
    assert finish.details.stages["handoff_retry"].ToNanoseconds() > 0
    cluster.prefill.fail_next(NO_BLOCKS)
    _, text, finish = await ask(cluster)
    assert (text, finish.details.attempt) == (cluster.answer(PROMPT, 6), 2)
    await cluster.settled()


async def test_the_decode_worker_may_overtake_the_first_token(cluster):
    cluster.prefill.hold(Hold.FIRST_TOKEN)
    asking = asyncio.create_task(ask(cluster))
    await cluster.prefill.waiting_at(Hold.FIRST_TOKEN)
    await cluster.decode.until(
        lambda: cluster.decode.received["reserve"] and not cluster.decode.live_requests
    )
    cluster.prefill.let_go(Hold.FIRST_TOKEN)
    assert (await asking)[1] == cluster.answer(PROMPT, 6)
    await cluster.settled()


async def test_one_token_needs_no_decode(cluster):
    _, text, finish = await ask(cluster, max_tokens=1)
    assert text == cluster.answer(PROMPT, 1)
    assert finish.details.tpot.ToNanoseconds() == 0
    await cluster.settled()


async def test_a_new_life_takes_the_place_of_the_old_one(start_cluster):
    cluster = await start_cluster(max_attempts=1)
    cluster.decode.hold(Hold.DECODE)
    asking = asyncio.create_task(ask(cluster))
    await cluster.decode.waiting_at(Hold.DECODE)
    again = await cluster.add(DECODE, "d0", epoch=2)
    code, message, _ = await asking
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "attached anew, with epoch 2" in message
    assert (await ask(cluster))[1] == cluster.answer(PROMPT, 6)
    assert again.received["reserve"] == 1
    with pytest.raises(WorkerRefusedError, match="earlier life"):
        await cluster.register(cluster.decode)
    assert cluster.sample("prelay_worker_epoch", role="decode", worker="d0") == 2
    assert cluster.sample("prelay_devices", role="decode") == 1
    await cluster.add(DECODE, "d1", num_devices=4)
    assert cluster.sample("prelay_devices", role="decode") == 5


async def test_a_worker_that_was_lost_may_be_registered_again(cluster):
    cluster.decode.break_stream()
    await cluster.until(lambda: not cluster.router.pool["d0"].up)
    await cluster.register(cluster.decode)
    await cluster.register(cluster.decode)  # said twice
    assert (await ask(cluster))[1] == cluster.answer(PROMPT, 6)


@pytest.mark.parametrize(
    ("capacity", "changes", "message"),
    [
        ({"vocab_size": 9}, {}, "a vocabulary of 9 tokens, but the router's checkpoint has 257"),
        ({"fingerprint": "other"}, {}, "all must load the same checkpoint"),
        ({}, {"role": PREFILL}, "says role decode, but prefill was expected"),
        ({}, {"worker_id": "d9"}, "says worker_id d1, but d9 was expected"),
        ({}, {"epoch": 7}, "this is epoch 1, not 7"),
        ({"protocol": (99, 0)}, {}, "says protocol_version 99, but 2 was expected"),
    ],
)
async def test_workers_that_are_not_what_was_announced(cluster, capacity, changes, message):
    worker = await cluster.fleet.start(DECODE, "d1", **capacity)
    announced = {"worker_id": "d1", "epoch": 1, "role": DECODE, "address": worker.info.address, **changes}
    async with grpc.aio.insecure_channel(cluster.addresses.admin) as channel:
        admin = admin_pb2_grpc.RouterAdminStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match=message) as caught:
            await admin.RegisterWorker(admin_pb2.RegisterWorkerRequest(**announced))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert (await ask(cluster))[1] == cluster.answer(PROMPT, 6)


async def test_minor_versions_may_differ(cluster):
    await cluster.add(DECODE, "d1", protocol=(worker_pb2.PROTOCOL_VERSION_CURRENT, 99))
    assert cluster.router.pool["d1"].up


async def test_a_worker_that_does_not_answer(cluster, monkeypatch):
    monkeypatch.setattr("router.workers.CONNECT_TIMEOUT_S", 0.05)
    role = cluster.router.pool["d0"].role
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(WorkerUnreachableError, match="did not answer within"):
            await cluster.router.workers.register(Registration("d1", 1, role, address))


async def test_nobody_at_the_address_is_known_at_once(cluster):
    """A life that has died must not keep the next one waiting."""
    role = cluster.router.pool["d0"].role
    with pytest.raises(WorkerUnreachableError, match="Connection refused"):
        await cluster.router.workers.register(Registration("d1", 1, role, "127.0.0.1:1"))


async def test_admin(cluster):
    await ask(cluster)
    async with grpc.aio.insecure_channel(cluster.addresses.admin) as channel:
        admin = admin_pb2_grpc.RouterAdminStub(channel)
        status = await admin.GetStatus(admin_pb2.GetStatusRequest())
        assert [(worker.info.worker_id, worker.up) for worker in status.workers] == [
            ("p0", True),
            ("d0", True),
        ]
        assert status.outcomes == {"good": 1}
        with pytest.raises(grpc.aio.AioRpcError, match="no worker 'd0' with epoch 9"):
            await admin.RemoveWorker(admin_pb2.RemoveWorkerRequest(worker_id="d0", epoch=9))
        with pytest.raises(grpc.aio.AioRpcError, match="must be given"):
            await admin.RegisterWorker(admin_pb2.RegisterWorkerRequest())
        dead = admin_pb2.RemoveWorkerRequest(worker_id="d0", epoch=1, comes_back=True)
        for _ in range(2):  # told twice is told once
            await admin.RemoveWorker(dead)
            status = await admin.GetStatus(admin_pb2.GetStatusRequest())
            assert [(worker.info.worker_id, worker.up) for worker in status.workers] == [
                ("p0", True),
                ("d0", False),
            ]
        # Who watches has to see that there should be one.
        assert cluster.sample("prelay_worker_up", role="decode", worker="d0") == 0
        assert cluster.sample("prelay_devices", role="decode") == 1
        await admin.RemoveWorker(admin_pb2.RemoveWorkerRequest(worker_id="d0", epoch=1))
        status = await admin.GetStatus(admin_pb2.GetStatusRequest())
        assert [worker.info.worker_id for worker in status.workers] == ["p0"]
    assert cluster.sample("prelay_devices", role="decode") == 0
