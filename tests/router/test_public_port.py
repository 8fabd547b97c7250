"""What the public ports do not do: say what is for operators, take headers without end, or wait for ever."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import grpc
import grpc.aio
import pytest
from prelay.v1 import admin_pb2, admin_pb2_grpc

from router import intake


@pytest.mark.parametrize("path", ["/metrics", "/targets", "/admin", "/debug", "/v1/workers"])
async def test_what_is_for_operators_is_not_on_the_public_http_port(start_cluster, path: str) -> None:
    cluster = await start_cluster()
    async with cluster.http() as http, http.get(path) as answer:
        assert answer.status == 404


async def test_the_admin_interface_is_not_on_the_public_grpc_port(start_cluster) -> None:
    cluster = await start_cluster()
    async with grpc.aio.insecure_channel(cluster.addresses.grpc) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await admin_pb2_grpc.RouterAdminStub(channel).GetStatus(admin_pb2.GetStatusRequest())
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_headers_have_an_end(start_cluster) -> None:
    cluster = await start_cluster()
    async with cluster.http() as http:
        async with http.get("/v1/models", headers={"x-tenant": "x" * 100_000}) as answer:
            assert answer.status == 400
        async with http.get("/v1/models") as answer:
            assert answer.status == 200


async def test_a_template_that_does_not_end_costs_its_own_request_only(
    start_cluster, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = tmp_path / "endless"
    shutil.copytree(checkpoint, endless)
    loops = "{% for a in range(3000) %}{% for b in range(3000) %}{% endfor %}{% endfor %}"
    (endless / "tokenizer_config.json").write_text(json.dumps({"chat_template": loops, "eos_token": "</s>"}))
    cluster = await start_cluster(checkpoint=str(endless))
    monkeypatch.setattr(intake, "TOKENIZE_LIMIT_S", 0.05)
    async with cluster.http() as http:
        messages = {"messages": [{"role": "user", "content": "hi"}]}
        async with http.post("/v1/chat/completions", json=messages) as answer:
            assert answer.status == 504
            assert (
                "could not be turned into tokens within 0.05 s" in (await answer.json())["error"]["message"]
            )
        prompt = {"prompt": "tell me", "max_tokens": 3}
        async with asyncio.timeout(20), http.post("/v1/completions", json=prompt) as answer:
            assert answer.status == 200
    await cluster.settled()
