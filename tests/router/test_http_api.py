"""What the HTTP front end offers beyond the plain call: choices, prompts of all kinds, headers, details."""

from __future__ import annotations

import asyncio
import json
from importlib.metadata import version

import pytest
from prelay.v1 import worker_pb2

from router.fake_holds import Hold
from router.fake_model import FakeModel
from router.requests import Outcome, Stage

PROMPT = "tell me"


async def post(http, path="/v1/completions", headers=None, **body):
    body = {"model": "fake", "max_tokens": 4, **body}
    if path == "/v1/completions":
        body.setdefault("prompt", PROMPT)
    async with http.post(path, json=body, headers=headers or {}) as response:
        assert response.status == 200, await response.text()
        return await response.json(), response.headers


async def events(response):
    """The data of all server-sent events, parsed but for [DONE]."""
    lines = [line.decode().strip() async for line in response.content]
    data = [line.removeprefix("data: ") for line in lines if line]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def usage(prompt_tokens, completion_tokens, cached_tokens=0):
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


async def test_prompts_of_every_kind(cluster):
    texts, ids = ["one", "two"], [list(b"one"), list(b"two")]
    expected = [cluster.answer(text, 4) for text in texts]
    async with cluster.http() as http:
        for prompt in (texts, ids):
            body, _ = await post(http, prompt=prompt)
            assert [choice["text"] for choice in body["choices"]] == expected
            assert [choice["index"] for choice in body["choices"]] == [0, 1]
            assert body["usage"] == usage(6, 8)
        body, _ = await post(http, prompt=ids[0], echo=True)
        assert body["choices"][0]["text"] == "one" + expected[0]


async def test_several_choices_have_seeds_of_their_own(cluster):
    async with cluster.http() as http:
        body, _ = await post(http, n=3, seed=7, headers={"x-prelay-details": "1"})
    assert [choice["text"] for choice in body["choices"]] == [cluster.answer(PROMPT, 4)] * 3
    assert body["usage"] == usage(7, 12)
    assert len({choice["prelay"]["request_id"] for choice in body["choices"]}) == 3
    assert sorted(reserve.sampling.seed for reserve in cluster.decode.reserves) == [7, 8, 9]


async def test_cached_tokens_count_once_for_a_prompt(start_cluster):
    cluster = await start_cluster(model=FakeModel(max_model_len=512, caches=True))
    async with cluster.http() as http:
        body, _ = await post(http, prompt=["one", "three"], n=2)
        assert body["usage"] == usage(8, 16, cached_tokens=6)
        payload = {
            "prompt": "one",
            "max_tokens": 3,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with http.post("/v1/completions", json=payload) as response:
            chunks = await events(response)
    assert chunks[-2]["usage"] == usage(3, 3, cached_tokens=2)


async def test_defaults_and_eos(start_cluster):
    cluster = await start_cluster(model=FakeModel(eos_token_id=256, answer_tokens=3, max_model_len=512))
    async with cluster.http() as http:
        body, _ = await post(http, max_tokens=None)
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["choices"][0]["text"] == cluster.answer(PROMPT, 512)
        assert body["usage"]["completion_tokens"] == 3
        body, _ = await post(http, max_tokens=6, ignore_eos=True)
        assert (body["choices"][0]["finish_reason"], body["usage"]["completion_tokens"]) == ("length", 6)
        body, _ = await post(http, max_tokens=6, min_tokens=5)
        assert (body["choices"][0]["finish_reason"], body["usage"]["completion_tokens"]) == ("stop", 5)
    sampling = cluster.decode.reserves[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert sampling.max_tokens == 512 - len(PROMPT)


async def test_both_names_of_max_tokens(cluster):
    async with cluster.http() as http:
        body, _ = await post(http, prompt="abc", max_completion_tokens=3, temperature=0)
        assert body["usage"]["completion_tokens"] == 3


async def test_default_max_tokens_fits_the_pool(start_cluster):
    cluster = await start_cluster(decode={"num_blocks": 4})
    async with cluster.http() as http:
        body, _ = await post(http, max_tokens=None)
        assert body["usage"]["total_tokens"] == 64
        async with http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 65}) as response:
            error = (await response.json())["error"]
        assert (response.status, error["code"]) == (400, "context_length_exceeded")
        assert "largest decode worker has 4" in error["message"]


async def test_a_stop_string_ends_the_stream_and_both_workers_forget_it(cluster):
    whole = cluster.answer(PROMPT, 40)
    stop = whole[10:13]
    async with cluster.http() as http:
        body, _ = await post(http, max_tokens=40, stop=stop)
        assert body["choices"][0]["text"] == whole[: whole.index(stop)]
        assert body["choices"][0]["finish_reason"] == "stop"
        payload = {"prompt": PROMPT, "max_tokens": 40, "stop": [stop], "stream": True}
        async with http.post("/v1/completions", json=payload) as response:
            chunks = await events(response)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == whole[: whole.index(stop)]
    await cluster.settled()


async def test_details(cluster):
    async with cluster.http() as http:
        body, headers = await post(http, headers={"x-prelay-details": "1", "x-request-id": "mine"})
        assert headers["x-request-id"] == "mine"
        assert body["id"] == "cmpl-mine"
        details = body["prelay"]
        assert details["request_id"].startswith("mine-")
        assert (details["prefill_worker"], details["decode_worker"]) == ("p0", "d0")
        assert (details["attempt"], details["outcome"], details["kv_bytes"]) == (1, "good", len(PROMPT))
        assert set(details["stages"]) == {stage.value for stage in Stage}
        assert sum(details["stages"].values()) == pytest.approx(details["duration_s"], abs=1e-9)
        assert details["stages"]["transfer"] > 0
        payload = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "stream": True}
        async with http.post(
            "/v1/chat/completions", json=payload, headers={"x-prelay-details": "1"}
        ) as response:
            assert response.content_type == "text/event-stream"
            chunks = await events(response)
    assert chunks[-1] == "[DONE]"
    assert ["prelay" in chunk for chunk in chunks[:-1]] == [False] * (len(chunks) - 2) + [True]


async def test_slo_headers_decide_the_outcome(cluster):
    async with cluster.http() as http:
        for headers, expected in (
            ({"x-slo-class": "strict"}, "both_miss"),
            ({"x-slo-class": "strict", "x-slo-ttft-ms": "30000"}, "tpot_miss"),
            ({"x-slo-class": "strict", "x-slo-tpot-ms": "30000"}, "ttft_miss"),
            ({}, "good"),
        ):
            body, _ = await post(http, headers={**headers, "x-prelay-details": "1"})
            assert body["prelay"]["outcome"] == expected


async def test_an_error_in_a_stream_is_an_event_and_then_done(start_cluster):
    cluster = await start_cluster(max_attempts=1)
    cluster.decode.hold(Hold.DECODE)
    payload = {"prompt": PROMPT, "max_tokens": 9, "stream": True}
    async with cluster.http() as http, http.post("/v1/completions", json=payload) as response:
        assert response.status == 200
        await cluster.decode.waiting_at(Hold.DECODE)
        cluster.decode.break_stream()
        chunks = await events(response)
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks[:-2])
    assert text == cluster.answer(PROMPT, 9)[:2]
    assert chunks[-2]["error"]["code"] == "worker_lost"
    assert "worker d0 was lost" in chunks[-2]["error"]["message"]
    assert chunks[-1] == "[DONE]"


async def test_an_error_before_the_first_token_has_a_status(start_cluster):
    cluster = await start_cluster(max_attempts=1)
    cluster.prefill.hold(Hold.PREFILL)
    payload = {"prompt": PROMPT, "max_tokens": 9, "stream": True}

    async def status_and_code(http):
        async with http.post("/v1/completions", json=payload) as response:
            return response.status, (await response.json())["error"]["code"]

    async with cluster.http() as http:
        posting = asyncio.create_task(status_and_code(http))
        await cluster.prefill.waiting_at(Hold.PREFILL)
        cluster.prefill.break_stream()
        assert await posting == (503, "worker_lost")


async def test_one_choice_of_several_fails_all(start_cluster):
    cluster = await start_cluster(max_attempts=1)
    cluster.decode.fail_next(worker_pb2.FAILURE_REASON_INTERNAL)
    async with cluster.http() as http:
        async with http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 9, "n": 3}) as response:
            assert response.status == 500
            assert (await response.json())["error"]["code"] == "worker_failed"
        await cluster.settled()


async def test_when_one_choice_fails_none_counts_as_left_by_the_client(start_cluster):
    cluster = await start_cluster(max_attempts=1)
    cluster.decode.fail_next(worker_pb2.FAILURE_REASON_INTERNAL)
    payload = {"prompt": PROMPT, "max_tokens": 9, "n": 3}
    async with cluster.http() as http, http.post("/v1/completions", json=payload) as response:
        assert response.status == 500
    assert cluster.router.dispatcher.live.tally.outcomes == {Outcome.ERROR: 3}


async def test_a_large_call_fails_at_once_and_none_of_it_is_placed_any_more(start_cluster):
    cluster = await start_cluster(
        max_choices=2000, max_gated_requests=2000, max_attempts=1, decode={"num_blocks": 1}
    )
    cluster.decode.fail_next(worker_pb2.FAILURE_REASON_INTERNAL)
    async with cluster.http() as http:
        payload = {"prompt": PROMPT, "max_tokens": 5, "n": 1500}
        async with http.post("/v1/completions", json=payload) as response:
            assert response.status == 500
    assert cluster.router.dispatcher.live.tally.outcomes == {Outcome.ERROR: 1500}
    assert cluster.sample("prelay_placement_total", kind="disaggregated") == 1
    await cluster.settled()


async def test_a_call_is_let_in_or_refused_as_a_whole(start_cluster):
    cluster = await start_cluster(max_gated_requests=2)
    payload = {"prompt": PROMPT, "max_tokens": 9, "n": 3}
    async with cluster.http() as http, http.post("/v1/completions", json=payload) as response:
        assert response.status == 429
    assert cluster.router.dispatcher.live.tally.outcomes == {Outcome.REJECTED: 3}
    assert len(cluster.router.dispatcher.live) == 0


async def test_streamed_choices_are_told_apart(cluster):
    payload = {"prompt": ["a", "b"], "n": 2, "max_tokens": 5, "stream": True, "echo": True}
    async with cluster.http() as http, http.post("/v1/completions", json=payload) as response:
        chunks = (await events(response))[:-1]
    texts = ["", "", "", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    a, b = "a" + cluster.answer("a", 5), "b" + cluster.answer("b", 5)
    assert texts == [a, a, b, b]


async def test_tokenize_and_detokenize(cluster):
    messages = [{"role": "developer", "content": [{"type": "text", "text": "hé"}]}]
    async with cluster.http() as http:
        body, _ = await post(http, "/tokenize", prompt="hé")
        assert body == {"tokens": list("hé".encode()), "count": 3, "max_model_len": 512}
        body, _ = await post(http, "/tokenize", messages=messages)
        assert bytes(body["tokens"]).decode() == "<system>hé\n<assistant>"
        body, _ = await post(http, "/detokenize", tokens=list("hé".encode()))
        assert body == {"prompt": "hé"}


async def test_health_follows_the_pools(cluster):
    async with cluster.http() as http:
        async with http.get("/health") as response:
            assert (response.status, (await response.json())["workers"]) == (
                200,
                {"prefill": 1, "decode": 1, "mixed": 0},
            )
        assert cluster.router.workers.remove("d0", 1)
        async with http.get("/health") as response:
            assert (response.status, (await response.json())["status"]) == (503, "unavailable")
        async with http.post("/v1/completions", json={"prompt": "x"}) as response:
            error = (await response.json())["error"]
        assert (response.status, error["code"]) == (503, "no_workers")
        assert "no decode worker" in error["message"]
        async with http.get("/version") as response:
            assert await response.json() == {"version": version("prelay")}
