"""Keys and limits of tenants: the core by itself, and at both front ends."""

from __future__ import annotations

import asyncio
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prelay.v1 import inference_pb2

from router.errors import RateLimitedError, SettingsError, UnauthenticatedError
from router.fake_holds import Hold
from router.tenant_file import TenantFile
from router.tenants import Account, Bucket, Tenants, read_accounts


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def file_of(folder: Path, text: str) -> Path:
    path = folder / "tenants.yaml"
    path.write_text(text)
    return path


TWO = f"""
tenants:
  search:
    keys: ["{digest("one").hex()}", "{digest("two").hex()}"]
    requests_per_minute: 2
  batch:
    keys: ["{digest("three").hex()}"]
    tokens_per_minute: 30
"""


def test_a_key_says_whose_request_it_is(tmp_path: Path) -> None:
    tenants = Tenants(read_accounts(file_of(tmp_path, TWO)))
    assert not tenants.is_open
    assert [tenants.who(f"Bearer {key}") for key in ("one", "two", "three")] == ["search", "search", "batch"]
    assert tenants.who("bearer  one ") == "search"
    for wrong in (
        None,
        "",
        "Bearer \udcff",
        "one",
        "Basic one",
        "Bearer ",
        "Bearer four",
        f"Bearer {digest('one').hex()}",
    ):
        with pytest.raises(UnauthenticatedError):
            tenants.who(wrong)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be `tenants:` with a name for each"),
        ("tenants: {}", "must be `tenants:` with a name for each"),
        ("tenants: {a: {keys: []}, x: 1}\nother: 1", "must be `tenants:` with a name for each"),
        ("tenants: {a: {}}", "a: give keys"),
        ("tenants: {a: {keys: [secret]}}", "64 hexadecimal digits"),
        ("tenants: {a: {keys: [7]}}", "64 hexadecimal digits"),
        ("tenants: {a: {keys: [], tokens: 1}}", "give keys"),
        ("tenants: {a: {keys: [], tokens_per_minute: 0}}", "tokens_per_minute is 0: a number above 0"),
        ("tenants: {a: {keys: [], requests_per_minute: yes}}", "requests_per_minute is True"),
        (
            f"tenants: {{a: {{keys: ['{'ab' * 32}']}}, b: {{keys: ['{'ab' * 32}']}}}}",
            "the same key is there twice",
        ),
        ("tenants: [", "is not YAML"),
        ("tenants: {a: {keys: []}}\ntenants: {b: {keys: []}}", "'tenants' is there twice"),
        ("tenants: {a: {keys: [2024-13-45]}}", "is not YAML"),
        (f"tenants: {{a: {{keys: [], tokens_per_minute: 1{'0' * 400}}}}}", "a number above 0"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        read_accounts(file_of(tmp_path, text))
    with pytest.raises(SettingsError, match="cannot be read"):
        read_accounts(tmp_path / "nowhere.yaml")


@given(st.floats(1, 1000), st.lists(st.tuples(st.floats(0, 30), st.floats(0, 500)), min_size=1, max_size=30))
def test_a_bucket_gives_no_more_than_its_rate_and_a_minute(
    per_minute: float, steps: list[tuple[float, float]]
) -> None:
    """Who waits until there is something, and takes at most `most` then, gets no more than that beyond it."""
    bucket, now, taken = Bucket(per_minute, 0.0), 0.0, 0.0
    most = max(amount for _, amount in steps)
    for pause, amount in steps:
        now += pause + bucket.wait_s(now + pause)
        assert bucket.wait_s(now + 1e-6) == pytest.approx(0.0, abs=1e-3)
        bucket.take(amount, now)
        taken += amount
    assert taken <= per_minute * (1 + now / 60) + most + 1e-6


def test_debts_are_paid_before_the_next_is_let_in(make_request) -> None:
    tenants = Tenants({"batch": Account((), tokens_per_minute=60.0)})
    request = replace(make_request(prompt_tokens=20), tenant="batch")
    tenants.admit([request], 0.0)
    tenants.answered("batch", 100, 1.0)
    with pytest.raises(RateLimitedError, match="'batch' has used its 60 tokens a minute") as refused:
        tenants.admit([request], 1.0)
    assert refused.value.retry_after_s == pytest.approx(20 + 100 - 60 - 1 + 1, abs=1.1)
    tenants.admit([request], 1.0 + refused.value.retry_after_s)
    tenants.admit([replace(request, tenant="another")], 1.0)


def test_what_is_refused_for_another_reason_costs_nothing(make_request) -> None:
    tenants = Tenants({"batch": Account((), requests_per_minute=1.0, tokens_per_minute=10.0)})
    request = replace(make_request(prompt_tokens=9), tenant="batch")
    for _ in range(5):
        tenants.admit([request], 0.0)
        tenants.refused([request], 0.0)
    tenants.admit([request], 0.0)
    with pytest.raises(RateLimitedError):
        tenants.admit([request], 0.0)


def test_what_waits_is_limited_but_a_call_by_itself_is_not(make_request) -> None:
    tenants = Tenants({"batch": Account((), waiting_tokens=30.0)})
    small, large = (
        replace(make_request(name, prompt_tokens=tokens), tenant="batch")
        for name, tokens in (("small", 20), ("large", 40))
    )
    tenants.admit([small], 0.0)
    tenants.waits(small)
    with pytest.raises(
        RateLimitedError, match="prompts of 20 tokens waiting, 20 more would be beyond its 30"
    ):
        tenants.admit([small], 0.0)
    tenants.admit([replace(small, tenant="another")], 0.0)
    tenants.waits_no_more(small)
    tenants.admit([large], 0.0)
    tenants.waits(large)
    with pytest.raises(RateLimitedError):
        tenants.admit([small], 0.0)
    tenants.waits_no_more(large)
    tenants.admit([small], 0.0)


def test_new_accounts_keep_what_was_used_unless_the_limit_changes(make_request) -> None:
    one = Account((digest("one"),), requests_per_minute=1.0)
    tenants = Tenants({"search": one})
    request = replace(make_request(), tenant="search")
    tenants.admit([request], 0.0)
    tenants.become({"search": replace(one, digests=(digest("new"),))})
    assert tenants.who("Bearer new") == "search"
    with pytest.raises(RateLimitedError):
        tenants.admit([request], 0.0)
    tenants.become({"search": replace(one, requests_per_minute=5.0)})
    tenants.admit([request], 0.0)


def test_the_file_is_followed_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    path = file_of(tmp_path, TWO)
    followed = TenantFile(path)
    path.write_text(TWO.replace("search", "found"))
    os.utime(path, ns=(1, 1))
    followed.look()
    assert followed.tenants.who("Bearer one") == "found"
    path.write_text("tenants: [")
    followed.look()
    path.unlink()
    followed.look()
    assert followed.tenants.who("Bearer one") == "found"
    assert TenantFile(None).tenants.is_open


async def test_http_wants_a_key(start_cluster, tmp_path: Path) -> None:
    cluster = await start_cluster(tenants=str(file_of(tmp_path, TWO)))
    body = {"prompt": "tell me", "max_tokens": 5, "temperature": 0}
    async with cluster.http() as http:
        for path in ("/health", "/version"):
            async with http.get(path) as response:
                assert response.status == 200
        for headers in ({}, {"authorization": "Bearer four"}, {"x-tenant": "search"}):
            async with http.post("/v1/completions", json=body, headers=headers) as response:
                error = (await response.json())["error"]
                assert (response.status, error["code"]) == (401, "invalid_api_key")
                assert response.headers["WWW-Authenticate"] == "Bearer"
        async with http.get("/v1/models") as response:
            assert response.status == 401
        known = {"authorization": "Bearer one", "x-tenant": "batch"}
        for _ in range(2):
            async with http.post("/v1/completions", json=body, headers=known) as response:
                assert response.status == 200
        async with http.post("/v1/completions", json=body, headers=known) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (429, "rate_limited")
            assert int(response.headers["Retry-After"]) >= 1
    assert {reserve.cache_salt for reserve in cluster.decode.reserves} == {"search"}, (
        "not what the client says"
    )
    await cluster.settled()


async def test_prompts_wait_until_their_answers_begin_or_they_are_left(start_cluster, tmp_path: Path) -> None:
    text = TWO.replace("tokens_per_minute: 30", "waiting_tokens: 10")
    cluster = await start_cluster(tenants=str(file_of(tmp_path, text)))
    body = {"prompt": "tell me", "max_tokens": 5, "temperature": 0}
    key = {"authorization": "Bearer three"}

    async def ask() -> int:
        async with cluster.http() as http, http.post("/v1/completions", json=body, headers=key) as response:
            await response.read()
            return response.status

    cluster.prefill.hold(Hold.PREFILL)
    for is_left in (True, False):
        waiting = asyncio.create_task(ask())
        await cluster.until(lambda: len(cluster.router.dispatcher.live) == 1)
        assert await ask() == 429
        if is_left:
            waiting.cancel()
            await cluster.until(lambda: not len(cluster.router.dispatcher.live))
    cluster.prefill.let_go(Hold.PREFILL)
    assert await waiting == 200
    assert await ask() == 200
    await cluster.settled()


async def test_grpc_wants_a_key(start_cluster, tmp_path: Path) -> None:
    cluster = await start_cluster(tenants=str(file_of(tmp_path, TWO)))
    sampling = inference_pb2.SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    request = inference_pb2.GenerateRequest(text="tell me", sampling=sampling, tenant="search")

    async def ask(metadata=()):
        async with cluster.grpc() as stub:
            return [message async for message in stub.Generate(request, metadata=metadata)]

    for metadata in ((), (("authorization", "Bearer four"),)):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(metadata)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    key = (("authorization", "Bearer three"),)
    # 7 of the prompt and 20 of the answer, then 20 more: in debt.
    for _ in range(2):
        assert await ask(key)
    with pytest.raises(grpc.aio.AioRpcError, match="has used its 30 tokens a minute") as refused:
        await ask(key)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await cluster.settled()


async def test_a_key_that_is_added_serves_without_a_restart(start_cluster, tmp_path: Path) -> None:
    path = file_of(tmp_path, TWO)
    cluster = await start_cluster(tenants=str(path))
    path.write_text(TWO.replace(digest("two").hex(), digest("new").hex()))
    os.utime(path, ns=(5, 5))
    async with cluster.http() as http:
        for _ in range(200):
            async with http.get("/v1/models", headers={"authorization": "Bearer new"}) as response:
                if response.status == 200:
                    break
            await asyncio.sleep(0.05)
        assert response.status == 200
        async with http.get("/v1/models", headers={"authorization": "Bearer two"}) as response:
            assert response.status == 401
