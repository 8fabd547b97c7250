"""Mixed workers: they read prompts themselves, take hand-offs as well, and are made up for as any other."""

from __future__ import annotations

import asyncio

import pytest
from prelay.v1 import inference_pb2, worker_pb2

from router.admission.structural import StructuralAdmission
from router.fake_holds import Hold
from router.gate.fcfs import FcfsGateQueue
from router.pair_table import Pair
from router.placement.base import Decision, Kind
from router.placement.colocated import ColocatedPlacement
from router.placement.least_loaded import LeastLoadedPlacement
from router.policy import Policy

PREFILL, DECODE, MIXED = worker_pb2.ROLE_PREFILL, worker_pb2.ROLE_DECODE, worker_pb2.ROLE_MIXED
PROMPT = "tell me"
DISAGGREGATED = Decision(Kind.DISAGGREGATED, "p0", "d0")


def local(worker_id):
    return Decision(Kind.LOCAL, None, worker_id)


def policy_of(placement):
    def policy(inputs):
        gate = FcfsGateQueue()
        admission = StructuralAdmission(inputs.pool, gate, inputs.max_gated_requests, inputs.retry_after_s)
        return Policy("test", admission, gate, placement(inputs), tells_urgency=False)

    return policy


class Scripted:
    """Decisions in turn; the last one for ever."""

    def __init__(self, *decisions):
        self._decisions = list(decisions)

    def choose(self, request, avoid, now):
        return self._decisions.pop(0) if len(self._decisions) > 1 else self._decisions[0]


colocated = policy_of(lambda inputs: ColocatedPlacement(inputs.pool))


async def mixed_only(start_cluster, *worker_ids, policy=colocated, **capacity):
    cluster = await start_cluster(policy=policy)
    for worker_id in ("p0", "d0"):
        assert cluster.router.workers.remove(worker_id, 1)
    return cluster, [await cluster.add(MIXED, worker_id, **capacity) for worker_id in worker_ids]


async def ask(cluster, prompt=PROMPT, max_tokens=9):
    """(text, finish) of one gRPC call."""
    sampling = inference_pb2.SamplingParams(max_tokens=max_tokens, temperature=0)
    async with cluster.grpc() as stub:
        call = stub.Generate(inference_pb2.GenerateRequest(text=prompt, sampling=sampling))
        messages = [message async for message in call]
    return "".join(message.text for message in messages), messages[-1].finish


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
async def test_a_mixed_worker_serves_alone(start_cluster, max_tokens):
    cluster, (worker,) = await mixed_only(start_cluster, "m0")
    text, finish = await ask(cluster, max_tokens=max_tokens)
    assert text == cluster.answer(PROMPT, max_tokens)
    (reserve,) = worker.reserves
    assert not reserve.HasField("prefill")
    assert not reserve.HasField("urgency")
    assert not worker.prefills
    details = finish.details
    assert (details.prefill_worker, details.decode_worker) == ("m0", "m0")
    assert (details.attempt, details.placement, details.outcome) == (1, "local", "good")
    stages = {name: value.ToNanoseconds() for name, value in details.stages.items()}
    assert sum(stages.values()) == pytest.approx(details.duration.ToNanoseconds(), abs=20)
    assert stages["prefill_queue"] == stages["prefill"] == 1000
    assert stages["transfer"] == stages["decode_queue"] == 0
    assert cluster.sample("prelay_placement_total", kind="local") == 1
    await cluster.settled()


async def test_health_and_shortage(start_cluster):
    cluster, _ = await mixed_only(start_cluster, "m0")
    async with cluster.http() as http:
        async with http.get("/health") as response:
            counts = (await response.json())["workers"]
            assert (response.status, counts) == (200, {"prefill": 0, "decode": 0, "mixed": 1})
        assert cluster.router.workers.remove("m0", 1)
        async with http.get("/health") as response:
            assert response.status == 503
        async with http.post("/v1/completions", json={"prompt": "x"}) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (503, "no_workers")


@pytest.mark.parametrize("hold", [Hold.PREFILL, Hold.FIRST_TOKEN, Hold.DECODE])
async def test_a_lost_mixed_worker_is_a_pause(start_cluster, hold):
    cluster, (first, second) = await mixed_only(start_cluster, "m0", "m1")
    first.hold(hold)
    asking = asyncio.create_task(ask(cluster))
    await first.waiting_at(hold)
    (live,) = cluster.router.dispatcher.live
    await cluster.until(lambda: len(live.record.token_ids) == (hold is Hold.DECODE))
    first.break_stream()
    text, finish = await asking
    assert text == cluster.answer(PROMPT, 9)
    assert (finish.details.decode_worker, finish.details.attempt) == ("m1", 2)
    assert second.reserves[0].num_output_tokens == (hold is Hold.DECODE)
    assert cluster.sample("prelay_recoveries_total", cause="worker_lost") == 1


@pytest.mark.parametrize(
    ("script", "lost"), [((DISAGGREGATED, local("m0")), "p0"), ((local("m0"), DISAGGREGATED), "m0")]
)
async def test_another_attempt_may_be_placed_in_the_other_way(start_cluster, script, lost):
    cluster = await start_cluster(policy=policy_of(lambda inputs: Scripted(*script)))
    mixed = await cluster.add(MIXED, "m0")
    worker = cluster.prefill if lost == "p0" else mixed
    worker.hold(Hold.FIRST_TOKEN)
    asking = asyncio.create_task(ask(cluster))
    await worker.waiting_at(Hold.FIRST_TOKEN)
    await worker.fail_running(worker_pb2.FAILURE_REASON_INTERNAL)
    text, finish = await asking
    assert text == cluster.answer(PROMPT, 9)
    assert finish.details.attempt == 2
    assert finish.details.placement == script[1].kind
    assert finish.details.decode_worker == script[1].decode
    worker.let_go(Hold.FIRST_TOKEN)
    await cluster.settled()


async def test_it_is_paired_and_takes_hand_offs_like_a_decode_worker(start_cluster):
    cluster = await start_cluster(policy=policy_of(lambda inputs: LeastLoadedPlacement(inputs.pool)))
    mixed = await cluster.add(MIXED, "m0")
    assert mixed.paired == {("p0", 1)}
    assert cluster.router.pool.pairs.get(Pair("p0", "m0")) is not None
    assert cluster.router.workers.remove("d0", 1)
    await cluster.add(PREFILL, "p1")  # whoever comes first
    assert mixed.paired == {("p0", 1), ("p1", 1)}
    text, finish = await ask(cluster)
    assert text == cluster.answer(PROMPT, 9)
    assert (finish.details.prefill_worker, finish.details.decode_worker) == ("p0", "m0")
    assert finish.details.placement == "disaggregated"
    assert finish.details.stages["transfer"].ToNanoseconds() == 1000
    await cluster.settled()
    assert cluster.router.workers.remove("p0", 1)
    await mixed.until(lambda: mixed.paired == {("p1", 1)})


async def test_a_mixed_worker_without_room_is_waited_for(start_cluster):
    cluster, (worker,) = await mixed_only(start_cluster, "m0")
    worker.fail_next(worker_pb2.FAILURE_REASON_NO_BLOCKS, worker_pb2.FAILURE_REASON_NO_BLOCKS)
    text, finish = await ask(cluster)
    assert (text, finish.details.attempt) == (cluster.answer(PROMPT, 9), 3)


async def test_a_client_that_leaves_frees_it(start_cluster):
    cluster, (worker,) = await mixed_only(start_cluster, "m0")
    worker.hold(Hold.DECODE)
    async with cluster.grpc() as stub:
        call = stub.Generate(inference_pb2.GenerateRequest(text=PROMPT))
        await call.read()
        await worker.waiting_at(Hold.DECODE)
        call.cancel()
        await cluster.settled()


async def test_a_decode_worker_does_not_read(start_cluster):
    cluster = await start_cluster(policy=policy_of(lambda inputs: Scripted(local("d0"))))
    async with cluster.http() as http, http.post("/v1/completions", json={"prompt": "x"}) as response:
        assert response.status == 400
        assert "a decode worker reads no prompts" in (await response.json())["error"]["message"]
