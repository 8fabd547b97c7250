"""A worker that is silent is suspected first: nothing new goes there, and nothing is taken from it."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from prelay.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, worker_pb2

from router.errors import SettingsError
from router.fake_holds import Hold
from router.settings import RouterSettings

DECODE = worker_pb2.ROLE_DECODE


async def ask(cluster, prompt="tell me"):
    sampling = inference_pb2.SamplingParams(max_tokens=6, temperature=0)
    async with cluster.grpc() as stub:
        call = stub.Generate(inference_pb2.GenerateRequest(text=prompt, sampling=sampling))
        messages = [message async for message in call]
    return "".join(message.text for message in messages), messages[-1].finish.details


def beat(cluster, worker_id):
    (link,) = [link for link in cluster.router.workers.links() if link.worker_id == worker_id]
    return link.last_snapshot.seq if link.last_snapshot else 0


async def test_suspected_and_back(start_cluster):
    now = [0.0]
    cluster = await start_cluster(clock=lambda: now[0], suspect_after_s=2.0, liveness_timeout_s=60.0)
    pool, others = cluster.router.pool, ["p0", "d1"]
    d1 = await cluster.add(DECODE, "d1")
    cluster.decode.hold(Hold.DECODE)
    held = asyncio.create_task(ask(cluster, "held"))
    await cluster.decode.waiting_at(Hold.DECODE)
    assert cluster.sample("prelay_worker_suspected", role="decode", worker="d0") == 0
    cluster.decode.fall_silent()
    while not pool["d0"].suspected:
        seen = {name: beat(cluster, name) for name in others}
        await cluster.until(lambda seen=seen: all(beat(cluster, name) > seen[name] for name in others))
        now[0] += 1.0
        cluster.router.workers.watch()
    assert pool["d0"].up
    assert not pool["d1"].suspected
    async with grpc.aio.insecure_channel(cluster.addresses.admin) as channel:
        admin = admin_pb2_grpc.RouterAdminStub(channel)
        status = await admin.GetStatus(admin_pb2.GetStatusRequest())
    assert {worker.info.worker_id for worker in status.workers if worker.suspected} == {"d0"}
    assert cluster.sample("prelay_worker_suspected", role="decode", worker="d0") == 1
    d1.hold(Hold.RESERVE)
    asking = [asyncio.create_task(ask(cluster, prompt)) for prompt in "abc"]
    await d1.waiting_at(Hold.RESERVE, 3)  # d0 has fewer requests
    assert cluster.decode.received["reserve"] == 1
    # What it has goes on there.
    cluster.decode.let_go(Hold.DECODE)
    text, details = await held
    assert (text, details.decode_worker, details.attempt) == (cluster.answer("held", 6), "d0", 1)
    cluster.decode.speak_again()
    await cluster.until(lambda: not pool["d0"].suspected)
    assert cluster.sample("prelay_worker_suspected", role="decode", worker="d0") == 0
    assert (await ask(cluster))[1].decode_worker == "d0"
    d1.let_go(Hold.RESERVE)
    await asyncio.gather(*asking)
    await cluster.settled()


async def test_when_all_of_a_role_are_suspected_requests_wait(start_cluster):
    now = [0.0]
    cluster = await start_cluster(clock=lambda: now[0], suspect_after_s=2.0, liveness_timeout_s=60.0)
    cluster.decode.fall_silent()
    while not cluster.router.pool["d0"].suspected:
        seen = beat(cluster, "p0")
        await cluster.until(lambda seen=seen: beat(cluster, "p0") > seen)
        now[0] += 1.0
        cluster.router.workers.watch()
    assert cluster.router.dispatcher.serving
    asking = asyncio.create_task(ask(cluster))
    await cluster.until(lambda: cluster.router.dispatcher.live.gated == 1)
    cluster.decode.speak_again()
    assert (await asking)[0] == cluster.answer("tell me", 6)


async def test_who_is_given_up_is_no_longer_suspected(cluster):
    (link,) = [link for link in cluster.router.workers.links() if link.worker_id == "d0"]
    cluster.decode.fall_silent()
    cluster.router.dispatcher.worker_suspected(link)
    assert cluster.sample("prelay_worker_suspected", role="decode", worker="d0") == 1
    cluster.decode.break_stream()
    await cluster.until(lambda: not cluster.router.pool["d0"].up)
    assert cluster.sample("prelay_worker_suspected", role="decode", worker="d0") == 0
    assert cluster.sample("prelay_worker_up", role="decode", worker="d0") == 0


async def test_a_new_life_is_not_suspected(start_cluster):
    now = [0.0]
    cluster = await start_cluster(clock=lambda: now[0], suspect_after_s=2.0, liveness_timeout_s=60.0)
    (link,) = [link for link in cluster.router.workers.links() if link.worker_id == "d0"]
    cluster.decode.fall_silent()
    cluster.router.dispatcher.worker_suspected(link)
    await cluster.add(DECODE, "d0", epoch=2)
    assert not cluster.router.pool["d0"].suspected
    assert cluster.sample("prelay_worker_suspected", role="decode", worker="d0") == 0


def test_suspicion_comes_before_death():
    with pytest.raises(SettingsError, match="must be suspected before it is given up"):
        RouterSettings(checkpoint="c", model_name="m", suspect_after_s=2.0, liveness_timeout_s=1.5)
