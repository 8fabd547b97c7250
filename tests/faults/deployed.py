"""A deployment of the demo model by `prelay serve`, to strike at: a real model, the real launcher.

The reference is the same model in one process, without pools, router or hand-off (`cluster.demo.reference`).
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import grpc.aio
from prelay.v1 import admin_pb2, admin_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import demo_model_path
from cluster.demo.clients import Answer, DemoClients
from cluster.demo.prompts import DemoPrompt, FrontEnd, demo_prompts
from cluster.demo.reference import Reference, compute_references, difference

KV_TOKENS = 8192
_ROOM = (
    "--set",
    f"prefill.kv_cache_tokens={KV_TOKENS}",
    "--set",
    f"decode.kv_cache_tokens={KV_TOKENS}",
    "--slo-class",
    "batch",  # in which nothing is late, and so refused, that merely waits for a worker to come back
)

TWO_AND_TWO = (*_ROOM, "--set", "prefill.replicas=2", "--set", "decode.replicas=2")

SPLIT_IN_TWO = (*_ROOM, "--set", "decode.tensor_parallel=2", "--set", "router.recovery_wait_s=60.0")
"""One worker of each role, and the decode worker is two processes."""

DEADLINE_S = 90.0
"""Of a request, a restart of every worker that it is on included."""

START_S = 60.0
"""Within this a worker that was killed serves again, also on two busy cores."""


class Deployed:
    """ready: what `prelay serve --json` printed."""

    def __init__(
        self, ready: dict[str, Any], clients: DemoClients, admin: admin_pb2_grpc.RouterAdminStub
    ) -> None:
        self._workers = [worker["worker_id"] for worker in ready["workers"]]
        self._clients = clients
        self._admin = admin
        self._pieces = 0

    @property
    def pieces(self) -> int:
        """Of answers, that have come so far."""
        return self._pieces

    async def status(self) -> dict[str, admin_pb2.WorkerStatus]:
        """What the router knows of its workers."""
        status = await self._admin.GetStatus(admin_pb2.GetStatusRequest())
        return {worker.info.worker_id: worker for worker in status.workers}

    async def up(self) -> set[str]:
        """The workers that requests are placed on."""
        return {name for name, worker in (await self.status()).items() if worker.up}

    async def all_up(self) -> None:
        await eventually(self.up, lambda up: up == set(self._workers), START_S)

    async def signal(self, worker_id: str, number: signal.Signals) -> admin_pb2.WorkerStatus:
        """To a worker's process; what was known of it then."""
        worker = (await self.status())[worker_id]
        os.kill(worker.info.pid, number)
        return worker

    async def ask(self, prompt: DemoPrompt) -> Answer:
        """Raises DemoError for anything but a complete answer, TimeoutError for one that does not come."""
        async with asyncio.timeout(DEADLINE_S):
            return await self._clients.ask(prompt, self._count)

    async def idle(self) -> None:
        """Until no block is held for anybody."""
        await eventually(self._held, lambda held: not any(held.values()), 20.0)

    async def _held(self) -> dict[str, float]:
        """KV blocks that are owned, leased, or missing in the books, by worker; and what the router holds."""
        status = await self._admin.GetStatus(admin_pb2.GetStatusRequest())
        held: dict[str, float] = {"router": status.live_requests}
        async with aiohttp.ClientSession() as session:
            for worker in status.workers:
                async with session.get(f"http://{worker.info.metrics_address}/metrics") as response:
                    families = text_string_to_metric_families(await response.text())
                blocks = {
                    sample.labels["state"]: sample.value
                    for family in families
                    for sample in family.samples
                    if sample.name == "prelay_kv_blocks"
                }
                free = blocks["free"] + blocks["cached"]
                held[worker.info.worker_id] = worker.info.num_blocks - free
        return held

    def _count(self, text: str) -> None:
        self._pieces += 1


@asynccontextmanager
async def deployed(ready: dict[str, Any]) -> AsyncIterator[Deployed]:
    """A client's view of what a Server of tests/cluster/conftest.py says when it is ready."""
    async with (
        DemoClients(ready["http"], ready["grpc"], ready["model"]) as clients,
        grpc.aio.insecure_channel(ready["admin"]) as admin,
    ):
        yield Deployed(ready, clients, admin_pb2_grpc.RouterAdminStub(admin))


def wishes(count: int, seed: int, shortest: int, longest: int) -> list[DemoPrompt]:
    """The demo's prompts, through both front ends, half of them sampled, with answers of so many tokens."""
    rng = random.Random(seed)
    return [
        replace(
            prompt,
            number=number,
            front_end=rng.choice(list(FrontEnd)),
            seed=rng.choice([None, number]),
            max_tokens=rng.randint(shortest, longest),
        )
        for number, prompt in enumerate(rng.choices(demo_prompts(), k=count))
    ]


async def references_of(prompts: Sequence[DemoPrompt]) -> list[Reference]:
    """What a run without faults answers."""
    return await asyncio.to_thread(compute_references, demo_model_path(), prompts, lambda done: None)


def differences(answers: Sequence[Answer], references: Sequence[Reference]) -> list[str]:
    found = [difference(*each) for each in zip(answers, references, strict=True)]
    return [what for what in found if what is not None]


async def eventually(
    observe: Callable[[], Awaitable[Any]], holds: Callable[[Any], bool], within_s: float
) -> None:
    """Waits until `holds` of what `observe` returns; fails with what it last was."""
    end = time.monotonic() + within_s
    while not holds(seen := await observe()):
        assert time.monotonic() < end, f"after {within_s} s: {seen}"
        await asyncio.sleep(0.1)
