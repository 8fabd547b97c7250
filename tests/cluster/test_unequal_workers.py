"""Workers of several ranks in `prelay serve`, split otherwise than those they hand their requests to."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest
from prelay.v1 import admin_pb2, admin_pb2_grpc

from cluster.config import demo_model_path
from cluster.demo.clients import DemoClients
from cluster.demo.prompts import demo_prompts
from cluster.demo.reference import compute_references, difference

if TYPE_CHECKING:
    from tests.cluster.conftest import Server

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Ready = dict[str, Any]


def start(start_server: Callable[..., Server], *assignments: str) -> tuple[Server, Ready]:
    flags = [flag for assignment in assignments for flag in ("--set", assignment)]
    server = start_server(*flags, "--set", "transfer.digest_share=1")
    return server, server.ready()


@pytest.mark.parametrize(
    ("prefill", "decode"), [((2, 1), (1, 1)), ((1, 1), (2, 1)), ((1, 2), (1, 1)), ((1, 2), (2, 1))]
)
async def test_answers_are_those_of_one_process(
    start_server: Callable[..., Server], prefill: tuple[int, int], decode: tuple[int, int]
) -> None:
    splits = {"prefill": prefill, "decode": decode}
    server, ready = start(
        start_server,
        *(
            f"{pool}.{key}={size}"
            for pool, split in splits.items()
            for key, size in zip(("tensor_parallel", "pipeline_parallel"), split, strict=True)
        ),
    )
    for worker in ready["workers"]:
        tp_size, pp_size = splits[worker["role"]]
        processes = [psutil.Process(worker["pid"]), *ranks_of(worker["pid"])]
        assert len(processes) == tp_size * pp_size
        # Each on the core of its one thread.
        cores = [process.cpu_affinity() for process in processes]
        assert [len(of_rank) for of_rank in cores] == [1] * len(processes)
        assert {core for of_rank in cores for core in of_rank} == set(worker["cores"])
    assert await wrong_answers(ready, 8) == []
    since = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(server.assert_gone, since, ready)


@pytest.mark.parametrize(("role", "signum"), [("prefill", signal.SIGKILL), ("decode", signal.SIGSTOP)])
async def test_a_rank_that_dies_or_hangs_takes_its_worker_along_which_comes_back(
    start_server: Callable[..., Server], role: str, signum: signal.Signals
) -> None:
    server, ready = start(start_server, f"{role}.tensor_parallel=2")
    (worker,) = [each for each in ready["workers"] if each["role"] == role]
    leader = psutil.Process(worker["pid"])
    (rank,) = ranks_of(leader.pid)
    os.kill(rank.pid, signum)
    psutil.wait_procs([leader, rank], timeout=20)
    assert not leader.is_running()
    assert not rank.is_running()
    async with grpc.aio.insecure_channel(ready["admin"]) as channel:
        stub = admin_pb2_grpc.RouterAdminStub(channel)
        async with asyncio.timeout(60):
            while not await serves_again(stub, worker["worker_id"], worker["epoch"]):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    assert await wrong_answers(ready, 2) == []
    since = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(server.assert_gone, since, ready)


def ranks_of(leader: int) -> list[psutil.Process]:
    """The processes of a worker's other ranks."""
    children = psutil.Process(leader).children()
    return [child for child in children if "engine.parallel.rank" in child.cmdline()]


async def serves_again(stub: Any, worker_id: str, old_epoch: int) -> bool:
    status = await stub.GetStatus(admin_pb2.GetStatusRequest())
    return any(
        each.up and each.info.worker_id == worker_id and each.info.epoch > old_epoch
        for each in status.workers
    )


async def wrong_answers(ready: Ready, count: int) -> list[str]:
    """How the answers to so many prompts differ from those of one process."""
    prompts = demo_prompts()[:count]
    async with DemoClients(ready["http"], ready["grpc"], ready["model"]) as clients:
        answers = await asyncio.gather(*(clients.ask(prompt, lambda text: None) for prompt in prompts))
    references = await asyncio.to_thread(compute_references, demo_model_path(), prompts, lambda done: None)
    found = [difference(answer, reference) for answer, reference in zip(answers, references, strict=True)]
    return [what for what in found if what is not None]
