"""Nonsense of many kinds at both front ends: always an answer or an error that is the client's, never one of
ours, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from typing import Any

import grpc.aio
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from prelay.v1 import inference_pb2
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from router.grpc_api import SERVICE_NAME
from tests.fuzz_seeds import FUZZ_CASES, FUZZ_SEEDS

_PROMISES = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
_JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 1e308, -1e308, 0.5, "", " ", "x", "\x00",
    "é" * 40, "\ud800", "a" * 20_000, [], [[]], [None], [1, "x"], {}, {"a": {}}, [0] * 600, ["x"] * 70,
    [[1, 2], [3]], "1", "nan",
)  # fmt: skip
_FINE = (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
_HEADERS = (
    "x-request-id", "x-tenant", "x-slo-class", "x-slo-ttft-ms", "x-slo-tpot-ms", "x-slo-priority",
    "x-slo-allow-downgrade", "x-prelay-details", "content-type", "content-encoding", "authorization",
)  # fmt: skip
_VALUES = ("", "0", "1", "-1", "1e400", "nan", "x" * 300, "standard", "gzip", "application/xml", "é", "inf")
_PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
_FIELDS = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "min_tokens", "temperature",
    "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "stream", "stream_options", "n", "logprobs",
    "top_logprobs", "echo", "prompt_logprobs", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "ignore_eos", "user", "best_of", "suffix", "tools", "response_format", "tokens",
    "what_is_this",
)  # fmt: skip


def body_of(dice: random.Random, path: str) -> dict[str, Any]:
    """One that is right, spoilt in a few places."""
    body: dict[str, Any] = {
        "/v1/completions": {"prompt": "tell me", "max_tokens": 3},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
        "/tokenize": {"prompt": "tell me"},
        "/detokenize": {"tokens": [65, 66]},
    }[path]
    for _ in range(dice.randint(1, 3)):
        field = dice.choice(_FIELDS)
        if dice.random() < 0.1:
            body.pop(field, None)
        else:
            body[field] = dice.choice(_JUNK)
    return body


def bytes_of(dice: random.Random, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    match dice.randrange(12):
        case 0:
            return dice.randbytes(dice.randrange(200))
        case 1:
            return data[: dice.randrange(len(data))]
        case 2:
            return b"[" * 3000
        case 3:
            return json.dumps([body]).encode()
    return data


@pytest.mark.parametrize("seed", FUZZ_SEEDS)
async def test_http(start_cluster, seed: int) -> None:
    cluster = await start_cluster()
    dice = random.Random(seed)
    statuses: set[int] = set()
    async with cluster.http() as http:
        for _ in range(250):
            path = dice.choice(_PATHS)
            headers = {"content-type": "application/json"}
            if dice.random() < 0.3:
                headers[dice.choice(_HEADERS)] = dice.choice(_VALUES)
            data = bytes_of(dice, body_of(dice, path))
            async with asyncio.timeout(20), http.post(path, data=data, headers=headers) as response:
                written = await response.text()
                statuses.add(response.status)
                assert response.status in (200, 400, 404, 413, 429), (path, headers, data[:200], written)
                if response.status != 200:
                    assert json.loads(written)["error"]["message"], (path, data[:200])
    assert {200, 400} <= statuses
    await cluster.settled()


async def test_http_by_its_own_description(start_cluster) -> None:
    """What schemathesis makes of the OpenAPI document: every answer is one that the document promises."""
    cluster = await start_cluster()
    url = cluster.base_url

    def attack() -> set[str]:
        described = schemathesis.openapi.from_url(f"{url}/openapi.json")
        tried = set()
        for result in described.get_all_operations():
            operation = result.ok()

            @given(case=operation.as_strategy())
            @settings(
                max_examples=FUZZ_CASES,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )
            def attacked(case: schemathesis.Case) -> None:
                case.call_and_validate(timeout=20, checks=_PROMISES)

            attacked()
            tried.add(operation.path)
        return tried

    tried = await asyncio.to_thread(attack)
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/models"} <= tried
    await cluster.settled()


@pytest.mark.parametrize("seed", FUZZ_SEEDS)
async def test_grpc(start_cluster, seed: int) -> None:
    cluster = await start_cluster()
    dice = random.Random(seed)
    right = inference_pb2.GenerateRequest(
        text="tell me", sampling=inference_pb2.SamplingParams(max_tokens=3, temperature=0.5, stop=["x"])
    ).SerializeToString()
    codes: set[grpc.StatusCode] = set()
    async with grpc.aio.insecure_channel(cluster.addresses.grpc) as channel:
        generate = channel.unary_stream(f"/{SERVICE_NAME}/Generate")  # bytes, as they are
        for _ in range(250):
            data = bytearray(right)
            for _ in range(dice.randint(1, 4)):
                data[dice.randrange(len(data))] = dice.randrange(256)
            if dice.random() < 0.2:
                data = bytearray(dice.randbytes(dice.randrange(100)))
            call = generate(bytes(data), timeout=20)
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in call:
                    pass
            code = await call.code()
            codes.add(code)
            assert code in _FINE, (bytes(data), code, await call.details())
    assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT} <= codes
    await cluster.settled()
