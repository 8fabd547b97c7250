"""Requests go only where two workers are linked; what never can be linked is refused with the reason."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from prelay.v1 import inference_pb2, worker_pb2

from router.pair_table import LinkState, Pair, PairLink, PairTable

PREFILL, DECODE = worker_pb2.ROLE_PREFILL, worker_pb2.ROLE_DECODE
MISMATCH = worker_pb2.FAILURE_REASON_PEER_MISMATCH
UNREACHABLE = worker_pb2.FAILURE_REASON_PEER_UNREACHABLE
FIELD = "dtype is bfloat16 here and float32 there"
PROMPT = "tell me"


async def ask(cluster):
    """(status code or None, message or text, finish) of one gRPC call."""
    sampling = inference_pb2.SamplingParams(max_tokens=6, temperature=0)
    async with cluster.grpc() as stub:
        call = stub.Generate(inference_pb2.GenerateRequest(text=PROMPT, sampling=sampling))
        try:
            messages = [message async for message in call]
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details(), None
    return None, "".join(message.text for message in messages), messages[-1].finish


NAMES = st.sampled_from("abc")
OPERATIONS = st.one_of(
    st.tuples(NAMES, NAMES, st.sampled_from(list(LinkState))), st.tuples(st.sampled_from("pd"), NAMES)
)


@given(operations=st.lists(OPERATIONS, max_size=40))
def test_the_table_is_what_was_said_last_of_those_who_live(operations):
    table, known = PairTable(), {}
    for operation in operations:
        if len(operation) == 3:
            pair = Pair("p" + operation[0], "d" + operation[1])
            known[pair] = PairLink(operation[2])
            table.put(pair, known[pair])
        else:
            worker = "".join(operation)
            table.forget(worker)
            known = {pair: link for pair, link in known.items() if worker not in (pair.prefill, pair.decode)}
    everybody = [Pair("p" + one, "d" + other) for one in "abc" for other in "abc"]
    assert {pair: table.get(pair) for pair in everybody} == {pair: known.get(pair) for pair in everybody}
    linked = {pair for pair, link in known.items() if link.state is LinkState.LINKED}
    assert {Pair(p, d) for p in ("pa", "pb", "pc") for d in table.linked_with(p)} == linked
    why = table.why_none(["pa", "pb"], ["da", "db"])
    some = [pair for pair in everybody if "c" not in pair.prefill + pair.decode]
    assert (why is None) == any(pair in linked for pair in some)
    if why is not None:
        mismatched = [known[pair].state is LinkState.MISMATCHED for pair in some if pair in known]
        assert why[0] == (mismatched == [True] * 4)


async def test_every_decode_worker_hears_of_every_prefill_worker(cluster):
    d1 = await cluster.add(DECODE, "d1")
    assert cluster.decode.paired == d1.paired == {("p0", 1)}
    await cluster.add(PREFILL, "p1", epoch=5)
    assert cluster.decode.paired == d1.paired == {("p0", 1), ("p1", 5)}
    again = await cluster.add(PREFILL, "p0", epoch=2)
    assert cluster.decode.paired == d1.paired == {("p0", 2), ("p1", 5)}
    assert cluster.decode.received["unpair"] == d1.received["unpair"] == 1
    # A prefill worker whose stream breaks may come back in the same life.
    again.break_stream()
    await cluster.until(lambda: not cluster.router.pool["p0"].up)
    await cluster.register(again)
    assert cluster.decode.received["unpair"] == 1
    assert (await ask(cluster))[1] == cluster.answer(PROMPT, 6)
    assert cluster.router.workers.remove("p0", 2)
    await d1.until(lambda: d1.paired == {("p1", 5)})
    await cluster.decode.until(lambda: cluster.decode.paired == {("p1", 5)})


async def test_a_worker_that_died_and_lives_again_is_unpaired_first(cluster):
    cluster.prefill.break_stream()
    await cluster.until(lambda: not cluster.router.pool["p0"].up)
    await cluster.add(PREFILL, "p0", epoch=2)
    kinds = [command.WhichOneof("message") for command in cluster.decode.commands]
    assert kinds == ["pair", "unpair", "pair"]
    assert [cluster.decode.commands[at].pair.prefill.epoch for at in (0, 2)] == [1, 2]
    assert cluster.decode.commands[1].unpair.prefill.epoch == 1


async def test_requests_wait_for_the_link(cluster):
    cluster.decode.refuse_pairs(UNREACHABLE, "nobody listens")
    await cluster.until(lambda: not cluster.router.pool.pairs.linked_with("p0"))
    asking = asyncio.create_task(ask(cluster))
    await cluster.until(lambda: cluster.router.dispatcher.live.gated == 1)
    assert cluster.decode.received["reserve"] == 0
    cluster.decode.accept_pairs()
    _, text, finish = await asking
    assert (text, finish.details.attempt) == (cluster.answer(PROMPT, 6), 1)


async def test_a_request_that_finds_no_link_waits_for_the_next_one(cluster):
    """The pair is asked about again, so the request does not fall back on it at once."""
    cluster.decode.refuse_pairs_silently(UNREACHABLE, "nobody listens")
    cluster.decode.fail_next(UNREACHABLE)
    asking = asyncio.create_task(ask(cluster))
    await cluster.until(lambda: cluster.router.pool.pairs.get(Pair("p0", "d0")) == PairLink(
        LinkState.UNREACHABLE, "nobody listens"))  # fmt: skip
    assert cluster.router.dispatcher.live.gated == 1
    assert cluster.decode.received["reserve"] == 1
    cluster.decode.accept_pairs()
    _, text, finish = await asking
    assert (text, finish.details.attempt) == (cluster.answer(PROMPT, 6), 2)


async def test_a_mismatched_pair_is_left_out(cluster, caplog):
    d1 = await cluster.add(DECODE, "d1")
    cluster.decode.refuse_pairs(MISMATCH, FIELD)
    await cluster.until(lambda: "d0" not in cluster.router.pool.pairs.linked_with("p0"))
    _, _, finish = await ask(cluster)
    assert finish.details.decode_worker == "d1"
    assert cluster.decode.received["reserve"] == 0
    assert any(FIELD in record.getMessage() and record.levelname == "WARNING" for record in caplog.records)
    assert d1.received["reserve"] == 1


async def test_when_nothing_fits_together_requests_are_refused_with_the_field(cluster):
    async with grpc.aio.insecure_channel(cluster.addresses.grpc) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        cluster.decode.refuse_pairs(MISMATCH, FIELD)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
    code, message, _ = await ask(cluster)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert f"d0 and p0 do not fit together: {FIELD}" in message
    async with cluster.http() as http, http.post("/v1/completions", json={"prompt": "x"}) as response:
        assert response.status == 503
        error = (await response.json())["error"]
        assert error["code"] == "no_pair"
        assert FIELD in error["message"]
    assert cluster.sample("prelay_admission_total", decision="rejected", reason="no_pair") == 2
    assert cluster.decode.received["reserve"] == 0
    # Another life may have another configuration.
    await cluster.add(DECODE, "d0", epoch=2)
    assert (await ask(cluster))[1] == cluster.answer(PROMPT, 6)


async def test_a_link_that_does_not_come_ends_the_wait(start_cluster):
    cluster = await start_cluster(recovery_wait_s=0.05)
    cluster.decode.refuse_pairs(UNREACHABLE, "nobody listens")
    await cluster.until(lambda: not cluster.router.pool.pairs.linked_with("p0"))
    code, message, _ = await ask(cluster)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "d0 and p0 are unreachable: nobody listens" in message
    await cluster.until(lambda: not cluster.router.dispatcher.serving)
    code, message, _ = await ask(cluster)  # and now at once
    assert code is grpc.StatusCode.UNAVAILABLE
    assert cluster.sample("prelay_admission_total", decision="rejected", reason="no_pair") >= 1
    cluster.decode.accept_pairs()
    await cluster.until(lambda: cluster.router.dispatcher.serving)
    assert (await ask(cluster))[1] == cluster.answer(PROMPT, 6)


@pytest.mark.parametrize(
    ("worker_id", "epoch"), [("p0", 9), ("p9", 1), ("d0", 1)], ids=["life", "worker", "role"]
)
async def test_what_is_said_of_others_is_ignored(cluster, worker_id, epoch):
    (link,) = [link for link in cluster.router.workers.links() if link.worker_id == "d0"]
    state = worker_pb2.PairState(worker_id=worker_id, epoch=epoch, reason=MISMATCH, message=FIELD)
    cluster.router.dispatcher.on_message(link, worker_pb2.WorkerMessage(pair=state))
    assert (await ask(cluster))[1] == cluster.answer(PROMPT, 6)
