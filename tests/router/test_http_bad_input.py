"""Whatever is sent, the answer is an OpenAI error object that helps, and the router goes on."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

GOOD = {"model": "fake", "prompt": "hi", "max_tokens": 2}
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def completion(**changes):
    return "/v1/completions", {**GOOD, **changes}


def chat(**changes):
    return "/v1/chat/completions", {**CHAT, **changes}


def message(content, **fields):
    return chat(messages=[{"role": "user", "content": content, **fields}])


@pytest.fixture(scope="module")
def refusals():
    """Calls that are refused with 400: (path, body), the param that is named, a part of the message."""
    return {
        "empty prompt": (completion(prompt=""), "prompt", "empty"),
        "no prompt": (completion(prompt=None), "prompt", "must be a text"),
        "prompt is a number": (completion(prompt=3), "prompt", "not a number"),
        "empty list": (completion(prompt=[]), "prompt", "empty list"),
        "empty token list": (completion(prompt=[[]]), "prompt", "empty"),
        "mixed list": (completion(prompt=["a", 1]), "prompt[1]", "not a number"),
        "token beyond vocabulary": (completion(prompt=[1, 999]), "prompt", "999"),
        "negative token": (completion(prompt=[-1]), "prompt", "-1"),
        "prompt too long": (completion(prompt="x" * 600), "prompt", "at most 512"),
        "answer too long": (completion(max_tokens=600), "max_tokens", "at most 510"),
        "max_tokens 0": (completion(max_tokens=0), "max_tokens", "at least 1"),
        "max_tokens negative": (completion(max_tokens=-5), "max_tokens", "-5"),
        "max_tokens text": (completion(max_tokens="5"), "max_tokens", "integer"),
        "max_tokens float": (completion(max_tokens=1.5), "max_tokens", "integer"),
        "max_tokens boolean": (completion(max_tokens=True), "max_tokens", "integer"),
        "max_tokens huge": (completion(max_tokens=10**30), "max_tokens", "less than"),
        "min_tokens above max": (completion(min_tokens=3), "min_tokens", "max_tokens (2)"),
        "temperature negative": (completion(temperature=-1), "temperature", "between 0"),
        "temperature text": (completion(temperature="hot"), "temperature", "number"),
        "temperature huge": (completion(temperature=1e308), "temperature", "between 0"),
        "top_p 0": (completion(top_p=0), "top_p", "greater than 0"),
        "top_k -2": (completion(top_k=-2), "top_k", "-1, 0 (all)"),
        "seed text": (completion(seed="x"), "seed", "integer"),
        "n 0": (completion(n=0), "n", "at least 1"),
        "n huge": (completion(n=1000), "n", "at most 64"),
        "too many prompts": (completion(prompt=["x"] * 65), "prompt", "at most 64"),
        "five stops": (completion(stop=list("abcde")), "stop", "at most 4"),
        "empty stop": (completion(stop=""), "stop", "1 to 256"),
        "long stop": (completion(stop="x" * 257), "stop", "1 to 256"),
        "stop number": (completion(stop=1), "stop", "string"),
        "stop list of numbers": (completion(stop=[1]), "stop[0]", "string"),
        "stop token": (completion(stop_token_ids=[9999]), "stop_token_ids", "9999"),
        "stream text": (completion(stream="yes"), "stream", "boolean"),
        "stream_options alone": (completion(stream_options={}), "stream_options", "stream is true"),
        "no messages": (chat(messages=[]), "messages", "empty"),
        "messages missing": (("/v1/chat/completions", {"model": "fake"}), "messages", "required"),
        "messages text": (chat(messages="hi"), "messages", "list"),
        "message without role": (chat(messages=[{"content": "x"}]), "messages[0].role", "required"),
        "unknown role": (message("x", role="robot"), "messages[0].role", "'system'"),
        "tool role": (message("x", role="tool"), "messages[0].role", "'user'"),
        "content null": (message(None), "messages[0].content", "null"),
        "image": (
            message([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]),
            "messages[0].content[1].type",
            "image_url",
        ),
        "part without text": (message([{"type": "text"}]), "messages[0].content[0].text", "null"),
        "tool calls": (message("x", tool_calls=[{"id": "1"}]), "messages[0].tool_calls", "not supported"),
        "tools": (chat(tools=[{"type": "function"}]), "tools", "tools is not supported"),
        "tool_choice": (chat(tool_choice="auto"), "tool_choice", "not supported"),
        "response_format": (
            chat(response_format={"type": "json_object"}),
            "response_format",
            "not supported",
        ),
        "logprobs number": (chat(logprobs=3), "logprobs", "boolean"),
        "logprobs boolean": (completion(logprobs=True), "logprobs", "integer"),
        "logprobs 6": (completion(logprobs=6), "logprobs", "between 0 and 5"),
        "top_logprobs 21": (chat(logprobs=True, top_logprobs=21), "top_logprobs", "between 0 and 20"),
        "top_logprobs alone": (chat(top_logprobs=1), "top_logprobs", "logprobs to be true"),
        "top_logprobs of a completion": (completion(top_logprobs=1), "top_logprobs", "not supported"),
        "prompt_logprobs 21": (chat(prompt_logprobs=21), "prompt_logprobs", "between 0 and 20"),
        "prompt_logprobs in a stream": (
            completion(prompt_logprobs=0, stream=True),
            "prompt_logprobs",
            "stream",
        ),
        "logit_bias list": (completion(logit_bias=[1]), "logit_bias", "dictionary"),
        "logit_bias word": (completion(logit_bias={"the": 1}), "logit_bias", "'the'; keys are token ids"),
        "logit_bias negative": (completion(logit_bias={"-1": 1}), "logit_bias", "keys are token ids"),
        "logit_bias beyond": (completion(logit_bias={"257": 1}), "logit_bias", "0 to 256"),
        "logit_bias too much": (completion(logit_bias={"1": 100.5}), "logit_bias", "between -100 and 100"),
        "logit_bias text": (completion(logit_bias={"1": "5"}), "logit_bias.1", "number"),
        "presence_penalty": (completion(presence_penalty=2.1), "presence_penalty", "between -2 and 2"),
        "frequency_penalty": (chat(frequency_penalty=-2.1), "frequency_penalty", "between -2 and 2"),
        "repetition_penalty": (
            completion(repetition_penalty=0),
            "repetition_penalty",
            "between 0.01 and 100",
        ),
        "min_p": (completion(min_p=-0.1), "min_p", "between 0 and 1"),
        "min_p text": (completion(min_p="0.1"), "min_p", "number"),
        "best_of": (completion(best_of=2), "best_of", "not supported"),
        "suffix": (completion(suffix="."), "suffix", "not supported"),
        "guided_json": (completion(guided_json={"type": "object"}), "guided_json", "not supported"),
        "modalities": (chat(modalities=["text", "audio"]), "modalities", "not supported"),
        "chat_template": (chat(chat_template="{{ 1 }}"), "chat_template", "not supported"),
        "body is a list": (("/v1/completions", []), None, "JSON object"),
        "nothing to tokenize": (("/tokenize", {}), "prompt", "either prompt or messages"),
        "detokenize text": (("/detokenize", {"tokens": "x"}), "tokens", "list"),
        "detokenize beyond": (("/detokenize", {"tokens": [4000]}), "tokens", "4000"),
    }


async def test_refused_with_the_field_named(cluster, refusals):
    async with cluster.http() as http:
        for name, ((path, body), param, part) in refusals.items():
            async with http.post(path, data=json.dumps(body).encode()) as response:
                error = (await response.json())["error"]
            assert (name, response.status, error["param"]) == (name, 400, param), error
            assert part in error["message"], (name, error)
            assert error["type"] == "invalid_request_error"
            assert response.headers["x-request-id"]
        await still_serves(cluster, http)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff\xfe", b'{"prompt": "\xff"}', b"nonsense", b"[" * 100_000, b'{"temperature": NaN}',
        b'{"temperature": Infinity}', b'{"prompt": "\\ud800"}', b"\x00", b'{"a": ' + b"9" * 10_000 + b"}",
    ],
)  # fmt: skip
async def test_what_is_not_json(cluster, body):
    async with cluster.http() as http:
        async with http.post("/v1/completions", data=body) as response:
            assert response.status == 400
            assert "error" in await response.json()
        await still_serves(cluster, http)


async def test_a_body_that_is_not_encoded_as_it_says(cluster, caplog):
    async with cluster.http() as http:
        headers = {"Content-Encoding": "gzip"}
        async with http.post("/v1/completions", data=b"plain", headers=headers) as response:
            assert response.status == 400
            assert "gzip" in (await response.json())["error"]["message"]
    async with cluster.http() as http:  # that connection is of no more use
        await still_serves(cluster, http)
    assert "defect" not in caplog.text


async def test_unknown_model_path_and_method(cluster):
    async with cluster.http() as http:
        for path, body in (completion(model="gpt-9"), chat(model="gpt-9"), ("/tokenize", {"model": "gpt-9"})):
            async with http.post(path, json=body) as response:
                error = (await response.json())["error"]
            assert (response.status, error["code"]) == (404, "model_not_found")
            assert "'fake'" in error["message"]
        async with http.get("/v1/nothing") as response:
            assert (response.status, (await response.json())["error"]["type"]) == (
                404,
                "invalid_request_error",
            )
        async with http.get("/v1/completions") as response:
            assert (response.status, response.headers["Allow"]) == (405, "POST")
            assert "POST" in (await response.json())["error"]["message"]


async def test_a_body_over_the_limit(start_cluster):
    cluster = await start_cluster(max_body_bytes=1000)
    async with cluster.http() as http:
        async with http.post("/v1/completions", data=b"x" * 2000) as response:
            assert response.status == 413
            assert "1000 bytes" in (await response.json())["error"]["message"]
        await still_serves(cluster, http)


async def test_headers(cluster):
    async with cluster.http() as http:
        for headers, part in (
            ({"x-slo-ttft-ms": "soon"}, "milliseconds"),
            ({"x-slo-ttft-ms": "-1"}, "positive"),
            ({"x-slo-tpot-ms": "nan"}, "positive"),
            ({"x-slo-class": "gold"}, "known: default, strict"),
            ({"x-request-id": "a b"}, "visible ASCII"),
            ({"x-request-id": "x" * 129}, "visible ASCII"),
        ):
            async with http.post("/v1/completions", json=GOOD, headers=headers) as response:
                error = (await response.json())["error"]
            assert (response.status, error["param"]) == (400, next(iter(headers)))
            assert part in error["message"]


async def test_a_connection_that_is_not_http(cluster):
    host, port = cluster.addresses.http.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
    assert b" 400 " in await reader.readline()
    writer.close()
    async with cluster.http() as http:
        await still_serves(cluster, http)


@pytest.mark.parametrize(
    "header", [b"Content-Encoding: br", b"X-Long: " + b"x" * 9000, b"Content-Length: -1", b"X\x00: 1"]
)
async def test_what_is_not_http_is_one_line_in_the_log(cluster, caplog, header):
    caplog.set_level(logging.INFO)
    host, port = cluster.addresses.http.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n"
    writer.write(head + header + b"\r\n\r\n{}")
    assert (await reader.readline()).split()[1] in (b"400", b"431")
    writer.close()
    records = [record for record in caplog.records if record.levelno >= logging.INFO]
    assert not any(record.exc_info for record in records)
    assert sum("bad_http" in record.getMessage() for record in records) <= 1
    async with cluster.http() as http:
        await still_serves(cluster, http)


async def test_neutral_values_and_unknown_fields_are_accepted(cluster, caplog):
    neutral = {
        "tools": [], "tool_choice": "none", "functions": None, "response_format": {"type": "text"},
        "logprobs": False, "top_logprobs": 0, "logit_bias": {}, "presence_penalty": 0,
        "frequency_penalty": 0.0, "repetition_penalty": 1.0, "best_of": 1, "modalities": ["text"],
        "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto",
        "parallel_tool_calls": True, "seed": -1, "top_k": -1, "top_p": 1,
    }  # fmt: skip
    caplog.set_level(logging.INFO, "router.openai_fields")
    async with cluster.http() as http:
        for _ in range(2):
            async with http.post(
                "/v1/chat/completions", json={**CHAT, **neutral, "vendor_knob": 7}
            ) as response:
                assert response.status == 200
    assert [record.message for record in caplog.records] == ["event=unknown_field_ignored name='vendor_knob'"]


async def still_serves(cluster, http):
    async with http.post("/v1/completions", json=GOOD) as response:
        assert response.status == 200
        assert (await response.json())["choices"][0]["text"] == cluster.answer("hi", 2)
    await cluster.settled()
