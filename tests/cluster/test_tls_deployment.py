"""A deployment with TLS everywhere: who gets in, who does not, and certificates that change while it
serves."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import grpc
import grpc.aio
import pytest
from prelay.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)

from cluster.certificates import make_certificates
from engine.tls import Identity, dial
from tests.cluster.asking import LENIENT, Ready, stopped
from tests.cluster.test_role_change import prelay

if TYPE_CHECKING:
    from tests.cluster.conftest import Server

pytestmark = [pytest.mark.ray, pytest.mark.slow]


async def ask_http(ready: Ready, ca: Path, client: Path | None) -> str:
    """An answer's text. Raises aiohttp.ClientError."""
    context = ssl.create_default_context(cafile=ca / "ca.crt")
    if client is not None:
        context.load_cert_chain(client / "tls.crt", client / "tls.key")
    body = {"model": ready["model"], "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"https://{ready['http']}/v1/completions", json=body, ssl=context) as answer,
    ):
        found = await answer.json()
        assert answer.status == 200, found
        text: str = found["choices"][0]["text"]
        return text


async def ask_grpc(channel: grpc.aio.Channel) -> str:
    request = inference_pb2.GenerateRequest(text="Once upon a time")
    request.sampling.max_tokens = 12
    request.sampling.temperature = 0
    call = inference_pb2_grpc.InferenceStub(channel).Generate(request)
    return "".join([message.text async for message in call])


async def controller_of(ready: Ready, identity: Identity) -> str:
    async with dial(ready["admin"], identity) as channel:
        status = await admin_pb2_grpc.RouterAdminStub(channel).GetStatus(admin_pb2.GetStatusRequest())
    address: str = status.controller
    return address


async def test_everything_is_encrypted_and_asks_for_certificates(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    make_certificates(inside, [], 1)
    make_certificates(outside, ["127.0.0.1"], 1)
    server = start_server(
        *LENIENT, "--set", f"tls.internal={inside}", "--set", f"tls.clients={outside}",
        "--set", "tls.client_certificates=true",
    )  # fmt: skip
    ready = server.ready()
    text = await ask_http(ready, outside, outside)
    credentials = grpc.ssl_channel_credentials(
        *((outside / name).read_bytes() for name in ("ca.crt", "tls.key", "tls.crt"))
    )
    async with grpc.aio.secure_channel(ready["grpc"], credentials) as channel:
        assert await ask_grpc(channel) == text

    # Nobody else gets in, at any of the ports.
    with pytest.raises(aiohttp.ClientError):
        await ask_http(ready, outside, None)
    with pytest.raises(aiohttp.ClientError):
        await ask_http(ready, outside, inside)
    identity = Identity(inside)
    for address in (ready["admin"], ready["grpc"]):
        async with grpc.aio.insecure_channel(address) as channel:
            stub = admin_pb2_grpc.RouterAdminStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=5)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    async with grpc.aio.insecure_channel(await controller_of(ready, identity)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await control_pb2_grpc.ControllerStub(channel).Drain(control_pb2.DrainRequest(), timeout=5).read()
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    for worker in ready["workers"]:
        async with grpc.aio.insecure_channel(worker["address"]) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary("/anything")(b"", timeout=5)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE

    # Operators get in with the deployment's certificates.
    code, written = await prelay(ready, "status", "--json", "--tls", str(inside))
    assert code == 0, written
    assert len(json.loads(written)["workers"]) == 2
    code, written = await prelay(ready, "status")
    assert code == 1
    assert "does not take calls without TLS (--tls DIR gives certificates)" in written
    code, written = await prelay(ready, "status", "--tls", str(outside))
    assert code == 1
    assert "does not take these certificates" in written
    code, written = await prelay(ready, "status", "--tls", str(tmp_path))
    assert code == 2, written
    assert "tls.crt cannot be read" in written
    code, written = await prelay(ready, "role", "decode-0", "mixed", "--tls", str(inside))
    assert code == 0, written

    # Certificates are renewed, and everything that is dialled from then on uses the new ones: a new life of a
    # worker, too.
    make_certificates(inside, [], 1)
    make_certificates(outside, ["127.0.0.1"], 1)
    assert await ask_http(ready, outside, outside) == text
    (pid,) = [worker["pid"] for worker in ready["workers"] if worker["worker_id"] == "prefill-0"]
    os.kill(pid, signal.SIGKILL)
    assert await ask_http(ready, outside, outside) == text
    await asyncio.to_thread(server.wait_for_log, "worker prefill-0 serves again")
    assert await ask_http(ready, outside, outside) == text
    await stopped(server, ready)


async def test_certificates_that_cannot_be_used_are_told_before_anything_starts(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    server = start_server("--set", f"tls.internal={tmp_path}")
    assert await asyncio.to_thread(server.process.wait) == 2
    assert f"tls.internal: {tmp_path}/tls.crt cannot be read" in server.log.read_text()
    server = start_server("--set", "tls.client_certificates=true")
    assert await asyncio.to_thread(server.process.wait) == 2
    assert "tls.client_certificates is true, but tls.clients is not given" in server.log.read_text()
