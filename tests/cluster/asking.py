"""Asking a deployment under test, and comparing its answers with those of one process."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING, Any

import grpc
from prelay.v1 import admin_pb2, admin_pb2_grpc

from cluster.config import demo_model_path
from cluster.demo.clients import DemoClients
from cluster.demo.prompts import DemoPrompt
from cluster.demo.reference import compute_references, difference

if TYPE_CHECKING:
    from tests.cluster.conftest import Server

Ready = dict[str, Any]

# What the policy does with requests that would be late is not tested here.
LENIENT = ("--slo-class", "batch")


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
