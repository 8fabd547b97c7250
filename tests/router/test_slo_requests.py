"""A request's SLO from the client to the workers and back: headers, fields, downgrades, refusals, status."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prelay.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, worker_pb2

from router.admission.base import Refusal
from router.errors import LateError, SloImpossibleError
from router.fake_holds import Hold
from router.policies import POLICIES
from router.policy import Policy
from router.slo import Slo, SloClass, SloLimits

CLASSES = {
    "default": SloClass(30.0, 30.0, downgrade_to="batch"),
    "fast": SloClass(20.0, 25.0, priority=5, downgrade_to="default"),
    "batch": SloClass(60.0, 50.0, priority=-1),
}
BATCH = Slo("batch", SloLimits(60.0, 50.0), -1)


class Judge:
    """An admission that answers with what it was told to, and keeps what it was asked."""

    def __init__(self, inner, verdict):
        self._inner = inner
        self._verdict = verdict
        self.asked = []
        self.in_vain = 0

    def judge(self, request, now, ahead, *, overdue):
        self.asked.append(request.slo)
        return self._verdict(request)

    def misfit(self, request):
        return self._inner.misfit(request)

    def could_have_served(self, now):
        in_vain, self.in_vain = self.in_vain, 0
        return in_vain


async def start(start_cluster, verdict=lambda request: request):
    judges = []

    def policy(inputs):
        made = POLICIES["least_loaded"](inputs)
        judges.append(Judge(made.admission, verdict))
        return Policy("judged", judges[0], made.gate, made.placement, tells_urgency=False)

    cluster = await start_cluster(policy=policy, slo_classes=CLASSES)
    return cluster, judges[0]


async def post(cluster, headers=None):
    """(status, body, headers)"""
    body = {"prompt": "hi", "max_tokens": 3}
    headers = {"x-prelay-details": "1", **(headers or {})}
    async with cluster.http() as http, http.post("/v1/completions", json=body, headers=headers) as response:
        return response.status, await response.json(), response.headers


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, Slo("default", SloLimits(30.0, 30.0))),
        ({"x-slo-class": "fast"}, Slo("fast", SloLimits(20.0, 25.0), 5)),
        ({"x-slo-priority": "-7"}, Slo("default", SloLimits(30.0, 30.0), -7)),
        ({"x-slo-ttft-ms": "1500"}, Slo("default", SloLimits(1.5, 30.0), own_ttft=True)),
        ({"x-slo-allow-downgrade": "1"}, Slo("default", SloLimits(30.0, 30.0), downgraded=BATCH)),
        ({"x-slo-allow-downgrade": "0"}, Slo("default", SloLimits(30.0, 30.0))),
    ],
)
async def test_headers(start_cluster, headers, expected):
    cluster, judge = await start(start_cluster)
    status, body, _ = await post(cluster, headers)
    assert (status, judge.asked) == (200, [expected])
    details = body["prelay"]
    assert details["slo_class"] == expected.slo_class
    assert details["ttft_limit_s"] == expected.limits.ttft_s
    assert details["tpot_limit_s"] == expected.limits.tpot_s
    assert details["placement"] == "disaggregated"


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-slo-class", "gold"),
        ("x-slo-ttft-ms", "soon"),
        ("x-slo-tpot-ms", "-1"),
        ("x-slo-priority", "1.5"),
        ("x-slo-priority", "2147483648"),
        ("x-slo-allow-downgrade", "yes"),
    ],
)
async def test_headers_that_make_no_sense(cluster, header, value):
    status, body, _ = await post(cluster, {header: value})
    assert (status, body["error"]["param"]) == (400, header)


async def test_fields(start_cluster):
    cluster, judge = await start(start_cluster)
    slo = inference_pb2.Slo(slo_class="fast", priority=0, allow_downgrade=True)
    slo.tpot.FromMilliseconds(500)
    async with cluster.grpc() as stub:
        call = stub.Generate(inference_pb2.GenerateRequest(text="hi", slo=slo))
        messages = [message async for message in call]
    default = Slo("default", SloLimits(30.0, 30.0), downgraded=BATCH)
    assert judge.asked == [Slo("fast", SloLimits(20.0, 0.5), 0, own_tpot=True, downgraded=default)]
    details = messages[-1].finish.details
    assert (details.slo_class, details.placement) == ("fast", "disaggregated")
    assert (details.ttft_limit.ToMilliseconds(), details.tpot_limit.ToMilliseconds()) == (20000, 500)


async def test_a_request_that_is_downgraded_is_judged_and_counted_as_what_it_became(start_cluster):
    cluster, _ = await start(start_cluster, lambda request: replace(request, slo=request.slo.downgraded))
    status, body, _ = await post(cluster, {"x-slo-allow-downgrade": "1"})
    assert (status, body["prelay"]["slo_class"]) == (200, "batch")
    assert cluster.sample("prelay_admission_total", decision="downgraded", reason="late") == 1
    assert cluster.sample("prelay_admission_total", decision="accepted", reason="none") == 0
    assert cluster.sample("prelay_requests_total", slo_class="batch", outcome="good") == 1


LATE = LateError(
    "busy: the first token would come after 4.2 s, the limit is 2 s; try again in 1.5 s", 1.5, 4.2
)


async def test_late_over_http(start_cluster):
    cluster, judge = await start(start_cluster, lambda request: Refusal("late", LATE, counts=True))
    status, body, headers = await post(cluster)
    assert (status, body["error"]["code"], headers["Retry-After"]) == (429, "late", "2")
    assert "4.2 s" in body["error"]["message"]
    assert cluster.sample("prelay_admission_total", decision="rejected", reason="late") == 1
    assert cluster.sample("prelay_requests_total", slo_class="default", outcome="rejected") == 1
    judge.in_vain = 1
    await cluster.until(lambda: cluster.sample("prelay_could_have_served_total") == 1)


async def test_late_over_grpc(start_cluster):
    cluster, _ = await start(start_cluster, lambda request: Refusal("late", LATE, counts=True))
    async with cluster.grpc() as stub:
        call = stub.Generate(inference_pb2.GenerateRequest(text="hi"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        trailers = dict(await call.trailing_metadata())
        status = await rpc_status.aio.from_call(call)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert trailers["grpc-retry-pushback-ms"] == "1500"
    retry, info = error_details_pb2.RetryInfo(), error_details_pb2.ErrorInfo()
    assert [status.details[0].Unpack(retry), status.details[1].Unpack(info)] == [True, True]
    assert retry.retry_delay.ToMilliseconds() == 1500
    assert (info.reason, dict(info.metadata)) == ("LATE", {"predicted_ttft_s": "4.200"})


async def test_impossible(start_cluster):
    error = SloImpossibleError("x-slo-ttft-ms is 1 ms, but ... takes 30 ms at least", "slo.ttft")
    cluster, _ = await start(start_cluster, lambda request: Refusal("slo_impossible", error, counts=False))
    status, body, _ = await post(cluster)
    assert (status, body["error"]["code"], body["error"]["param"]) == (400, "slo_impossible", "slo.ttft")
    assert cluster.sample("prelay_requests_total", slo_class="default", outcome="rejected") == 0
    assert cluster.sample("prelay_admission_total", decision="rejected", reason="slo_impossible") == 1


async def test_status(start_cluster):
    now = 10.0
    cluster = await start_cluster(slo_classes=CLASSES, clock=lambda: now)
    async with grpc.aio.insecure_channel(cluster.addresses.admin) as channel:
        stub = admin_pb2_grpc.RouterAdminStub(channel)
        before = await stub.GetStatus(admin_pb2.GetStatusRequest())
        assert (before.policy, before.tokens, before.ttft.p50_s) == ("least_loaded", 0, 0.0)
        assert await post(cluster, {"x-slo-class": "fast"})
        cluster.decode.hold(Hold.DECODE)
        asking = asyncio.create_task(post(cluster))
        await cluster.decode.waiting_at(Hold.DECODE)
        (live,) = cluster.router.dispatcher.live
        await cluster.until(lambda: len(live.record.token_ids) == 2)
        now = 12.5
        during = await stub.GetStatus(admin_pb2.GetStatusRequest())
        assert {one.info.worker_id: one.live_requests for one in during.workers} == {"p0": 0, "d0": 1}
        assert during.uptime_s == 2.5
        cluster.decode.let_go(Hold.DECODE)
        await asking
        after = await stub.GetStatus(admin_pb2.GetStatusRequest())
    assert {name: dict(one.outcomes) for name, one in after.classes.items()} == {
        "default": {"good": 1}, "fast": {"good": 1}, "batch": {},
    }  # fmt: skip
    assert (after.classes["fast"].ttft_limit_s, after.classes["fast"].tpot_limit_s) == (20.0, 25.0)
    assert after.tokens == 6
    assert (after.ttft.p50_s, after.tpot.p50_s, after.tpot.p99_s) == (0.0, 0.0, 1.25)


async def test_workers_that_are_down_have_no_requests(cluster):
    await cluster.add(worker_pb2.ROLE_DECODE, "d1")
    cluster.decode.break_stream()
    await cluster.until(lambda: not cluster.router.pool["d0"].up)
    (link,) = (one for one in cluster.router.workers.links() if one.worker_id == "d0")
    assert cluster.router.workers.live_requests(link) == 0


async def test_a_class_that_these_workers_cannot_keep_is_named_once(start_cluster, caplog):
    latency = {"step": 0.5}
    classes = {"default": SloClass(30.0, 30.0), "fast": SloClass(20.0, 0.4)}
    cluster = await start_cluster(
        slo_classes=classes, prefill={"latency": latency}, decode={"latency": latency}
    )
    await cluster.until(lambda: "limit_cannot_be_kept" in caplog.text)
    await cluster.add(worker_pb2.ROLE_DECODE, "d1", latency=latency)
    await cluster.settled()
    said = [record.getMessage() for record in caplog.records if "limit_cannot_be_kept" in record.getMessage()]
    assert len(said) == 1
    assert "slo_classes.fast.tpot_s is 0.4, but the fastest workers need 0.5 s" in said[0]
