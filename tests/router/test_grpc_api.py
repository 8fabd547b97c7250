"""The gRPC front end: answers, statuses with details, health, reflection, deadlines, cancellation."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from prelay.v1 import inference_pb2, worker_pb2

from engine.router_messages import sampling_of
from engine.sequence import TokenSampling
from router.fake_holds import Hold
from router.fake_model import FakeModel, fake_logprobs
from router.requests import Stage

PROMPT = "tell me"


def generate(text=PROMPT, **fields):
    fields.setdefault("sampling", inference_pb2.SamplingParams(max_tokens=6, temperature=0))
    return inference_pb2.GenerateRequest(text=text, **fields)


async def collect(call):
    return [message async for message in call]


async def refusal(call):
    """Status code, message, and the details of the google.rpc.Status, of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(call)
    status = await rpc_status.aio.from_call(call)
    return caught.value, list(status.details) if status is not None else []


async def test_generate(cluster):
    async with cluster.grpc() as stub:
        messages = await collect(stub.Generate(generate(request_id="mine")))
    assert {message.request_id for message in messages} == {"mine"}
    assert "".join(message.text for message in messages) == cluster.answer(PROMPT, 6)
    assert bytes(token for message in messages for token in message.token_ids).decode() == cluster.answer(
        PROMPT, 6
    )
    assert [message.HasField("finish") for message in messages] == [False] * (len(messages) - 1) + [True]
    finish = messages[-1].finish
    assert finish.reason == inference_pb2.FINISH_REASON_LENGTH
    assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (7, 6)
    details = finish.details
    assert (details.prefill_worker, details.decode_worker, details.outcome) == ("p0", "d0", "good")
    assert set(details.stages) == {stage.value for stage in Stage}
    total = sum(duration.ToNanoseconds() for duration in details.stages.values())
    assert total == pytest.approx(details.duration.ToNanoseconds(), abs=len(Stage))
    await cluster.settled()


async def test_token_ids_and_chat(cluster):
    ids = inference_pb2.TokenIds(ids=list(PROMPT.encode()))
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
    sampling = inference_pb2.SamplingParams(max_tokens=6)
    async with cluster.grpc() as stub:
        for field, prompt in (("token_ids", PROMPT), ("chat", "<user>hi\n<assistant>")):
            value = ids if field == "token_ids" else chat
            request = inference_pb2.GenerateRequest(**{field: value}, sampling=sampling)
            messages = await collect(stub.Generate(request))
            assert "".join(message.text for message in messages) == cluster.answer(prompt, 6)


async def test_what_is_sent_reaches_the_workers(cluster):
    sampling = inference_pb2.SamplingParams(
        max_tokens=3, min_tokens=2, ignore_eos=True, temperature=0.5, top_p=0.25, top_k=7, seed=2**64 - 1,
        stop_token_ids=[5], min_p=0.125, presence_penalty=-2, frequency_penalty=2, repetition_penalty=1.5,
        logit_bias={7: -100, 256: 0.5}, logprobs=0, prompt_logprobs=20,
    )  # fmt: skip
    async with cluster.grpc() as stub:
        await collect(stub.Generate(generate(sampling=sampling)))
    expected = worker_pb2.TokenSampling(
        max_tokens=3, min_tokens=2, temperature=0.5, top_p=0.25, top_k=7, seed=2**64 - 1, stop_token_ids=[5],
        min_p=0.125, presence_penalty=-2, frequency_penalty=2, repetition_penalty=1.5,
        logit_bias={7: -100, 256: 0.5}, logprobs=0, prompt_logprobs=20,
    )  # fmt: skip
    assert cluster.decode.reserves[0].sampling == expected
    assert bytes(cluster.decode.reserves[0].token_ids) == PROMPT.encode()
    assert sampling_of(expected) == TokenSampling(
        max_tokens=3, min_tokens=2, temperature=0.5, top_p=0.25, top_k=7, seed=2**64 - 1,
        stop_token_ids=frozenset({5}), min_p=0.125, presence_penalty=-2, frequency_penalty=2,
        repetition_penalty=1.5, logit_bias=((7, -100), (256, 0.5)), logprobs=0, prompt_logprobs=20,
    )  # fmt: skip


async def test_what_is_not_sent_is_neutral(cluster):
    async with cluster.grpc() as stub:
        await collect(stub.Generate(generate(sampling=inference_pb2.SamplingParams(max_tokens=3, seed=1))))
    assert sampling_of(cluster.decode.reserves[0].sampling) == TokenSampling(
        1.0, 0, 1.0, 1, 3, 0, frozenset({256})
    )


async def test_log_probabilities_of_prompt_and_answer(start_cluster):
    cluster = await start_cluster(
        model=FakeModel(eos_token_id=256, answer_tokens=4, max_model_len=512, caches=True)
    )
    sampling = inference_pb2.SamplingParams(max_tokens=6, logprobs=2, prompt_logprobs=1)
    async with cluster.grpc() as stub:
        messages = await collect(stub.Generate(generate(sampling=sampling)))
    assert [list(message.token_ids) for message in messages] == [
        [one.token_id for one in message.logprobs] for message in messages
    ]
    first, *later = messages
    assert [one.text for one in first.prompt_logprobs] == list(PROMPT[1:])
    assert not any(message.prompt_logprobs for message in later)
    answer = [one for message in messages for one in message.logprobs]
    assert "".join(one.text for one in answer[:-1]) == cluster.answer(PROMPT, 6)
    assert answer[-1].text == "</s>"  # ends the answer, is a token of it, and no text
    for index, one in enumerate(answer):
        expected = fake_logprobs(one.token_id, index, 2)
        assert (one.logprob, one.rank) == (expected.logprob, expected.rank)
        assert [top.token_id for top in one.top] == list(expected.top_ids)
        assert [top.logprob for top in one.top] == list(expected.top_logprobs)
    assert messages[-1].finish.usage.cached_tokens == len(PROMPT) - 1


async def test_model_info(cluster):
    async with cluster.grpc() as stub:
        info = await stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
    assert info == inference_pb2.GetModelInfoResponse(
        model="fake", max_model_len=512, vocab_size=257, eos_token_ids=[256]
    )


async def test_refused_with_the_field_named(cluster):
    sampling = inference_pb2.SamplingParams
    slo = inference_pb2.Slo
    refused = {
        "prompt": generate(""),
        "max_tokens": generate(sampling=sampling(max_tokens=-1)),
        "temperature": generate(sampling=sampling(temperature=float("nan"))),
        "top_p": generate(sampling=sampling(top_p=2)),
        "min_tokens": generate(sampling=sampling(max_tokens=2, min_tokens=-1)),
        "stop": generate(sampling=sampling(stop=[""])),
        "min_p": generate(sampling=sampling(min_p=1.01)),
        "presence_penalty": generate(sampling=sampling(presence_penalty=2.01)),
        "frequency_penalty": generate(sampling=sampling(frequency_penalty=float("nan"))),
        "repetition_penalty": generate(sampling=sampling(repetition_penalty=0)),
        "logit_bias": generate(sampling=sampling(logit_bias={257: 1})),
        "logprobs": generate(sampling=sampling(logprobs=21)),
        "prompt_logprobs": generate(sampling=sampling(prompt_logprobs=-1)),
        "slo.slo_class": generate(slo=slo(slo_class="gold")),
        "slo.ttft": generate(slo=slo(ttft=duration_pb2.Duration(seconds=-1))),
        "slo.tpot": generate(slo=slo(tpot=duration_pb2.Duration())),
        "request_id": generate(request_id="x" * 200),
        "chat.messages": inference_pb2.GenerateRequest(chat=inference_pb2.Chat()),
        "chat.messages[0].role": inference_pb2.GenerateRequest(
            chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="robot")])
        ),
    }
    async with cluster.grpc() as stub:
        for field, request in refused.items():
            error, details = await refusal(stub.Generate(request))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            bad = error_details_pb2.BadRequest()
            assert details[0].Unpack(bad)
            assert bad.field_violations[0].field == field
        error, _ = await refusal(stub.Generate(inference_pb2.GenerateRequest()))
        assert "no prompt is given" in error.details()
        error, _ = await refusal(stub.Generate(generate(model="other")))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        await collect(stub.Generate(generate()))


async def test_bytes_that_are_not_a_request(start_cluster):
    cluster = await start_cluster(max_body_bytes=10_000)
    async with grpc.aio.insecure_channel(cluster.addresses.grpc) as channel:
        raw = channel.unary_stream("/prelay.v1.Inference/Generate")
        invalid_utf8 = b"\x12\x02\xff\xff"
        for data in (invalid_utf8, b"\xff\xff\xff", b"\x12\x7f"):
            error, _ = await refusal(raw(data))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "not a GenerateRequest" in error.details()
        error, _ = await refusal(raw(b"\x12" * 20_000))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    async with cluster.grpc() as stub:
        await collect(stub.Generate(generate()))


async def test_overload_says_when_to_come_again(start_cluster):
    cluster = await start_cluster(max_gated_requests=1, retry_after_s=2.5, decode={"num_blocks": 1})
    cluster.prefill.hold(Hold.PREFILL)
    async with cluster.grpc() as stub:
        first, second = stub.Generate(generate()), stub.Generate(generate())
        await cluster.prefill.waiting_at(Hold.PREFILL)
        await cluster.until(lambda: len(cluster.router.dispatcher.live) == 2)
        call = stub.Generate(generate())
        error, details = await refusal(call)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        retry = error_details_pb2.RetryInfo()
        assert details[0].Unpack(retry)
        assert retry.retry_delay.ToMilliseconds() == 2500
        assert dict(await call.trailing_metadata())["grpc-retry-pushback-ms"] == "2500"
        async with cluster.http() as http, http.post("/v1/completions", json={"prompt": "x"}) as response:
            assert (response.status, response.headers["Retry-After"]) == (429, "3")
            assert (await response.json())["error"]["type"] == "rate_limit_error"
        cluster.prefill.let_go(Hold.PREFILL)
        await collect(first)
        await collect(second)
    assert cluster.sample("prelay_requests_total", slo_class="default", outcome="rejected") == 2
    assert cluster.sample("prelay_admission_total", decision="rejected", reason="gate_full") == 2


async def test_a_deadline_frees_both_legs(cluster):
    cluster.decode.hold(Hold.DECODE)
    async with cluster.grpc() as stub:
        error, _ = await refusal(stub.Generate(generate(), timeout=0.3))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await cluster.settled()


async def test_the_routers_own_limit(start_cluster):
    cluster = await start_cluster(request_timeout_s=0.05)
    cluster.prefill.hold(Hold.PREFILL)
    async with cluster.grpc() as stub:
        error, _ = await refusal(stub.Generate(generate()))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "not complete after 0.05 s" in error.details()
    async with cluster.http() as http, http.post("/v1/completions", json={"prompt": "x"}) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (504, "deadline_exceeded")
    await cluster.settled()
    assert cluster.sample("prelay_requests_total", slo_class="default", outcome="error") == 2


@pytest.mark.parametrize("hold", list(Hold))
async def test_a_caller_that_cancels_frees_both_legs(cluster, hold):
    worker = cluster.prefill if hold in (Hold.PREFILL, Hold.FIRST_TOKEN) else cluster.decode
    worker.hold(hold)
    async with cluster.grpc() as stub:
        call = stub.Generate(generate())
        await worker.waiting_at(hold)
        call.cancel()
        await cluster.settled()
    assert cluster.router.dispatcher.live.tally.outcomes == {"cancelled": 1}


async def test_health(cluster):
    async with grpc.aio.insecure_channel(cluster.addresses.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        serving = health_pb2.HealthCheckResponse
        for service in ("", "prelay.v1.Inference"):
            assert (
                await health.Check(health_pb2.HealthCheckRequest(service=service))
            ).status == serving.SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(service="prelay.v1.Inference"))
        assert (await watch.read()).status == serving.SERVING
        cluster.decode.break_stream()
        assert (await watch.read()).status == serving.NOT_SERVING
        watch.cancel()


async def test_reflection(cluster):
    async with grpc.aio.insecure_channel(cluster.addresses.grpc) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        listing = await call.read()
        names = {service.name for service in listing.list_services_response.service}
    assert names == {
        "prelay.v1.Inference",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
