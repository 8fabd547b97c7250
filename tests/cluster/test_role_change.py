"""`prelay role`, `scale` and `drain` on a deployment that answers all the while."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc.aio
import pytest
from prelay.v1 import worker_pb2_grpc

from cluster.demo.prompts import demo_prompts
from tests.cluster.asking import LENIENT, Ready, status_of, stopped, wrong_answers

if TYPE_CHECKING:
    from tests.cluster.conftest import Server

pytestmark = [pytest.mark.ray, pytest.mark.slow]


async def prelay(ready: Ready, *arguments: str) -> tuple[int, str]:
    """Exit code and what it wrote."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cluster.cli", *arguments, "--admin", ready["admin"],
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    written, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, written.decode()


async def roles(ready: Ready) -> dict[str, str]:
    names = {1: "prefill", 2: "decode", 3: "mixed"}
    return {worker.info.worker_id: names[worker.info.role] for worker in (await status_of(ready)).workers}


@pytest.mark.parametrize(("gone", "left"), [("prefill-0", "decode-0"), ("decode-0", "prefill-0")])
async def test_the_rest_stands_in_for_a_role_that_is_gone(
    start_server: Callable[..., Server], gone: str, left: str
) -> None:
    server = start_server("--prefill", "1", "--decode", "1", *LENIENT)
    ready = server.ready()
    prompts = [replace(prompt, max_tokens=60) for prompt in demo_prompts()[:6]]
    (pid,) = [worker["pid"] for worker in ready["workers"] if worker["worker_id"] == gone]
    asking = asyncio.create_task(wrong_answers(ready, prompts))
    os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(server.wait_for_log, f"worker {left} stands in: it is mixed from now on")
    assert await asking == []
    await asyncio.to_thread(server.wait_for_log, f"worker {left} goes back to its own role")
    while await roles(ready) != {"prefill-0": "prefill", "decode-0": "decode"}:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    assert await wrong_answers(ready, prompts) == []
    assert set((await status_of(ready)).outcomes) == {"good"}
    await stopped(server, ready)


async def test_answers_are_right_while_roles_change(start_server: Callable[..., Server]) -> None:
    server = start_server("--prefill", "1", "--decode", "1", *LENIENT)
    ready = server.ready()
    epochs = {worker["worker_id"]: worker["epoch"] for worker in ready["workers"]}
    pids = {worker["pid"] for worker in ready["workers"]}
    prompts = [replace(prompt, max_tokens=100) for prompt in demo_prompts()[:6]]
    is_over = asyncio.Event()
    rounds: list[list[str]] = []

    async def ask_on() -> None:
        while not is_over.is_set():
            rounds.append(await wrong_answers(ready, prompts))

    asking = asyncio.create_task(ask_on())
    for arguments, becomes in (
        (("role", "decode-0", "mixed"), {"prefill-0": "prefill", "decode-0": "mixed"}),
        (("role", "prefill-0", "mixed"), {"prefill-0": "mixed", "decode-0": "mixed"}),
        (("role", "decode-0", "prefill"), {"prefill-0": "mixed", "decode-0": "prefill"}),
        (("scale", "prefill=1", "decode=1", "mixed=0"), {"prefill-0": "decode", "decode-0": "prefill"}),
    ):
        code, written = await prelay(ready, *arguments)
        assert code == 0, written
        assert await roles(ready) == becomes
    is_over.set()
    await asking
    assert rounds
    assert not any(rounds)
    status = await status_of(ready)
    assert set(status.outcomes) == {"good"}, "none was lost"
    assert {worker.info.pid for worker in status.workers} == pids, "on the weights that were loaded"
    assert all(worker.info.epoch > epochs[worker.info.worker_id] for worker in status.workers)
    # A life that ends is followed by one of the new role.
    (reader,) = [worker.info for worker in status.workers if worker.info.worker_id == "decode-0"]
    os.kill(reader.pid, signal.SIGKILL)
    await asyncio.to_thread(server.wait_for_log, "worker decode-0 serves again")
    assert (await roles(ready))["decode-0"] == "prefill"
    assert await wrong_answers(ready, prompts) == []
    address = (await status_of(ready)).workers[0].info.address
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="of its own deployment only"):
            await worker_pb2_grpc.WorkerStub(channel).Attach().read()
    for arguments, code, said in (
        (("role", "decode-0", "decode"), 2, "both 0, so no worker could read prompts"),
        (("role", "nobody", "mixed"), 2, "there are prefill-0, decode-0"),
        (("drain", "decode-0"), 2, "nobody could read prompts"),
    ):
        found, written = await prelay(ready, *arguments)
        assert (found, said in written) == (code, True), written
    await stopped(server, ready)


async def test_answers_are_right_while_all_processes_are_replaced(
    start_server: Callable[..., Server],
) -> None:
    server = start_server("--prefill", "1", "--decode", "1", *LENIENT)
    ready = server.ready()
    before = {worker["worker_id"]: (worker["pid"], worker["epoch"]) for worker in ready["workers"]}
    prompts = [replace(prompt, max_tokens=100) for prompt in demo_prompts()[:6]]
    is_over = asyncio.Event()
    rounds: list[list[str]] = []

    async def ask_on() -> None:
        while not is_over.is_set():
            rounds.append(await wrong_answers(ready, prompts))

    asking = asyncio.create_task(ask_on())
    code, written = await prelay(ready, "upgrade")
    assert code == 0, written
    is_over.set()
    await asking
    assert rounds
    assert not any(rounds)
    status = await status_of(ready)
    assert set(status.outcomes) == {"good"}, "none was lost"
    assert await roles(ready) == {"prefill-0": "prefill", "decode-0": "decode"}
    for worker in status.workers:
        pid, epoch = before[worker.info.worker_id]
        assert worker.info.pid != pid
        assert worker.info.epoch > epoch
        assert f"{worker.info.worker_id} serves with version {worker.info.version} (epoch" in written
    assert await prelay(ready, "upgrade", "nobody") == (
        2, "prelay: error: there is no worker 'nobody': there are prefill-0, decode-0\n"
    )  # fmt: skip
    await stopped(server, ready)
