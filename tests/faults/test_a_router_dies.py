"""kill -9 and SIGSTOP of a router, with another one beside it on the same workers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest
from prelay.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc

from router.settings import RouterSettings
from router.worker_link import ROLE_OF_PROTO
from tests.faults.harness import DEADLINE_S, LIVENESS_S, STORYTELLER, Ask, Cluster, mixed

pytestmark = pytest.mark.slow


@asynccontextmanager
async def other_router(
    cluster: Cluster,
) -> AsyncIterator[tuple[inference_pb2_grpc.InferenceStub, asyncio.subprocess.Process]]:
    """A router in a process of its own, that all workers of the cluster are registered with."""
    doors = dict.fromkeys(("http", "grpc", "metrics", "admin"), "127.0.0.1:0")
    settings = RouterSettings(
        checkpoint=str(STORYTELLER), model_name="fake", liveness_timeout_s=LIVENESS_S, **doors
    )
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "router", settings.to_json(), stdin=pipe, stdout=pipe
    )
    assert process.stdout is not None
    addresses = json.loads(await process.stdout.readline())
    roles = {role.value: proto for proto, role in ROLE_OF_PROTO.items()}
    async with (
        grpc.aio.insecure_channel(addresses["admin"]) as admin,
        grpc.aio.insecure_channel(addresses["grpc"]) as public,
    ):
        for worker in cluster.workers.values():
            spec = worker.spec
            await admin_pb2_grpc.RouterAdminStub(admin).RegisterWorker(
                admin_pb2.RegisterWorkerRequest(
                    worker_id=spec.worker_id, epoch=spec.epoch, role=roles[spec.role], address=worker.address
                )
            )
        yield inference_pb2_grpc.InferenceStub(public), process
    if process.returncode is None:
        process.kill()
    await process.wait()
    process._transport.close()  # type: ignore[attr-defined]


async def test_what_it_had_placed_is_freed_and_nobody_else_notices(cluster: Cluster) -> None:
    """F4: its streams end with it; the workers cancel them at once, however they stand."""
    async with other_router(cluster) as (stub, process):
        await cluster.tell("decode", "pace 0.02")
        # Few enough for all to be placed at once, and long enough for none to end before the kill.
        theirs = [Ask(stub, *wish, DEADLINE_S) for wish in mixed(6, 40, max_tokens=600)]
        await asyncio.gather(*(ask.reaches(5) for ask in theirs))
        ours = cluster.ask_all(mixed(20, 41, max_tokens=60))
        process.kill()
        await asyncio.gather(*(ask.end() for ask in theirs))
        await cluster.all_is_well(*ours)
        await cluster.all_is_well(*theirs, code=grpc.StatusCode.UNAVAILABLE)


async def test_one_that_pauses_goes_on_where_it_was(cluster: Cluster) -> None:
    """It does not take its own pause for the workers'."""
    async with other_router(cluster) as (stub, process):
        await cluster.tell("decode", "pace 0.02")
        theirs = [Ask(stub, *wish, DEADLINE_S) for wish in mixed(10, 42, max_tokens=60)]
        await asyncio.gather(*(ask.reaches(5) for ask in theirs))
        os.kill(process.pid, signal.SIGSTOP)
        await asyncio.sleep(2 * LIVENESS_S)
        os.kill(process.pid, signal.SIGCONT)
        await cluster.all_is_well(*theirs)
        assert {ask.finish.details.attempt for ask in theirs} == {1}
