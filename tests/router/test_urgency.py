"""What workers are told of a request's SLO: what is left of it."""

from __future__ import annotations

import asyncio

import pytest
from prelay.v1 import inference_pb2, worker_pb2

from router.fake_holds import Hold
from router.policies import POLICIES
from router.policy import Policy
from router.slo import SloClass, SloLimits
from router.urgency import Urgency, urgency


def test_before_the_first_token(make_request):
    request = make_request(arrived_at=10.0, limits=SloLimits(2.0, 0.1))
    assert urgency(request, 10.5, None, 8) == Urgency(1.5, 0.1, 0)
    assert urgency(request, 13.0, None, 8) == Urgency(-1.0, 0.1, 0)


@pytest.mark.parametrize(
    ("elapsed_s", "tpot_s"),
    [
        (0.4, 0.1),  # 4 tokens in 0.4 s: on the limit
        (0.0, 0.14),  # they came at once, so the 10 others may take (14 * 0.1) / 10
        (0.8, 0.06),
        (0.88, 0.052),
        (0.95, 0.1),  # 0.045 is more than twice as fast: given up
        (9.0, 0.1),
    ],
)
def test_after_it_what_is_left_for_the_tokens_to_come(make_request, elapsed_s, tpot_s):
    request = make_request(limits=SloLimits(2.0, 0.1)).going_on([1, 2, 3, 4, 5])
    told = urgency(request, 100.0 + elapsed_s, 100.0, 10)
    assert told.ttft_left_s is None
    assert told.tpot_s == pytest.approx(tpot_s)


def urgent(inputs):
    made = POLICIES["least_loaded"](inputs)
    return Policy("urgent", made.admission, made.gate, made.placement, tells_urgency=True)


async def collect(cluster, slo):
    async with cluster.grpc() as stub:
        sampling = inference_pb2.SamplingParams(max_tokens=5)
        call = stub.Generate(inference_pb2.GenerateRequest(text="hi", sampling=sampling, slo=slo))
        return [message async for message in call]


async def test_both_workers_are_told(start_cluster):
    now = 100.0
    cluster = await start_cluster(
        policy=urgent, clock=lambda: now, slo_classes={"default": SloClass(3.0, 0.5, priority=4)}
    )
    await cluster.add(worker_pb2.ROLE_DECODE, "d1")
    cluster.prefill.hold(Hold.PREFILL)
    cluster.decode.hold(Hold.DECODE)
    asking = asyncio.create_task(collect(cluster, None))
    await cluster.prefill.waiting_at(Hold.PREFILL)
    (prefill,), (reserve,) = cluster.prefill.prefills, cluster.decode.reserves
    for told in (prefill.urgency, reserve.urgency):
        assert (told.ttft_left_s, told.tpot_s, told.priority) == (3.0, 0.5, 4)
    cluster.prefill.let_go(Hold.PREFILL)
    (live,) = cluster.router.dispatcher.live
    await cluster.until(lambda: len(live.record.token_ids) == 2)
    now += 1.0
    cluster.decode.break_stream()  # the next placement goes on after two tokens, which took 1 s
    await asking
    again = cluster.prefill.prefills[-1].urgency
    assert not again.HasField("ttft_left_s")
    assert again.tpot_s == pytest.approx((0.5 * 4 - 1.0) / 3)


async def test_a_request_s_own_limits_and_priority(start_cluster):
    cluster = await start_cluster(policy=urgent, clock=lambda: 100.0)
    slo = inference_pb2.Slo(priority=-3)
    slo.ttft.FromMilliseconds(1500)
    await collect(cluster, slo)
    told = cluster.prefill.prefills[0].urgency
    assert (told.ttft_left_s, told.tpot_s, told.priority) == (1.5, 30.0, -3)


async def test_policies_that_do_not_tell(cluster):
    await collect(cluster, None)
    assert not cluster.prefill.prefills[0].HasField("urgency")
    assert not cluster.decode.reserves[0].HasField("urgency")
