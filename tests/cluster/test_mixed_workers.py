"""Mixed workers in `prelay serve`: beside a prefill worker, which they can do without, and alone."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from prelay.v1 import admin_pb2, admin_pb2_grpc

from cluster.config import demo_model_path
from cluster.demo.clients import DemoClients
from cluster.demo.prompts import DemoPrompt, demo_prompts
from cluster.demo.reference import compute_references, difference

if TYPE_CHECKING:
    from tests.cluster.conftest import Server

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Ready = dict[str, Any]

# What the policy does with requests that would be late is not tested here.
LENIENT = ("--slo-class", "batch")


async def test_a_mixed_worker_serves_with_a_prefill_worker_and_without(
    start_server: Callable[..., Server],
) -> None:
    server = start_server("--prefill", "1", "--decode", "0", "--mixed", "1", *LENIENT)
    ready = server.ready()
    assert [worker["role"] for worker in ready["workers"]] == ["prefill", "mixed"]
    assert await wrong_answers(ready, demo_prompts()[:8]) == []
    status = await status_of(ready)
    assert all(worker.info.latency for worker in status.workers), "its steps were measured"
    (prefill,) = [worker["pid"] for worker in ready["workers"] if worker["role"] == "prefill"]
    os.kill(prefill, signal.SIGKILL)
    # It takes seconds until there is another one; nobody waits for it.
    assert await wrong_answers(ready, demo_prompts()[8:12]) == []
    await stopped(server, ready)


async def test_mixed_workers_alone_serve_and_stand_in_for_each_other(
    start_server: Callable[..., Server],
) -> None:
    server = start_server(
        "--prefill", "0", "--decode", "0", "--mixed", "2", "--policy", "colocated", *LENIENT
    )
    ready = server.ready()
    assert await wrong_answers(ready, demo_prompts()[:8]) == []
    # Streams that one of them writes go on at the other, word for word.
    prompts = [replace(prompt, max_tokens=200) for prompt in demo_prompts()[:4]]
    answers = asyncio.create_task(wrong_answers(ready, prompts))
    while not (await status_of(ready)).live_requests:  # noqa: ASYNC110
        await asyncio.sleep(0)
    os.kill(ready["workers"][0]["pid"], signal.SIGKILL)
    assert await answers == []
    await stopped(server, ready)


async def wrong_answers(ready: Ready, prompts: list[DemoPrompt]) -> list[str]:
    """How the answers differ from those of one process."""
    async with DemoClients(ready["http"], ready["grpc"], ready["model"]) as clients:
        answers = await asyncio.gather(*(clients.ask(prompt, lambda text: None) for prompt in prompts))
    references = await asyncio.to_thread(compute_references, demo_model_path(), prompts, lambda done: None)
    found = [difference(answer, reference) for answer, reference in zip(answers, references, strict=True)]
    return [what for what in found if what is not None]


async def status_of(ready: Ready) -> admin_pb2.GetStatusResponse:
    async with grpc.aio.insecure_channel(ready["admin"]) as channel:
        status: admin_pb2.GetStatusResponse = await admin_pb2_grpc.RouterAdminStub(channel).GetStatus(
            admin_pb2.GetStatusRequest()
        )
    return status


async def stopped(server: Server, ready: Ready) -> None:
    since = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(server.assert_gone, since, ready)
