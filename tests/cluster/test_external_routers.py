"""Several routers before the same workers: each answers, any of them may go and come back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cluster.demo.prompts import demo_prompts
from cluster.errors import RouterError
from cluster.external_routers import ExternalRouters
from tests.cluster.asking import LENIENT, status_of, wrong_answers
from tests.cluster.conftest import FREE_PORTS, STOP_LIMIT_S
from tests.cluster.test_role_change import prelay, roles

if TYPE_CHECKING:
    from tests.cluster.conftest import Server

Ready = dict[str, Any]
StartRouter = Callable[..., tuple[subprocess.Popen[str], Ready]]


@pytest.fixture
def start_router() -> Iterator[StartRouter]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> tuple[subprocess.Popen[str], Ready]:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "router", "--json", *arguments],
            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        return process, json.loads(process.stdout.readline())

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.ray
async def test_any_router_answers_and_one_that_comes_back_gets_its_workers(
    start_server: Callable[..., Server], start_router: StartRouter
) -> None:
    first, one = start_router(*FREE_PORTS, *LENIENT)
    second, other = start_router(*FREE_PORTS, *LENIENT)
    server = start_server("--set", f"router.external=[{one['admin']!r}, {other['admin']!r}]", ports=())
    ready = server.ready()
    assert "http" not in ready, "it has no router of its own"
    prompts = [replace(prompt, max_tokens=40) for prompt in demo_prompts()[:4]]
    assert await asyncio.gather(*(wrong_answers(router, prompts) for router in (one, other))) == [[], []]

    # A change is made for both.
    code, written = await prelay(one, "role", "decode-0", "mixed")
    assert code == 0, written
    assert await roles(one) == await roles(other) == {"prefill-0": "prefill", "decode-0": "mixed"}
    assert (await prelay(other, "role", "decode-0", "decode"))[0] == 0

    # One dies: the other serves on, and the first gets its workers when it is back.
    first.kill()
    first.wait()
    assert await wrong_answers(other, prompts) == []
    ports = [f(name) for name in ("http", "grpc", "metrics", "admin") for f in ("--{}".format, one.get)]
    _, again = start_router(*ports, *LENIENT)
    assert again["admin"] == one["admin"]
    while sum(worker.up for worker in (await status_of(again)).workers) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    assert await wrong_answers(again, prompts) == []
    assert (await prelay(again, "drain", "decode-0"))[0] == 2, "it knows the controller again, who refuses"

    # A worker that dies is replaced for both.
    (pid,) = [worker["pid"] for worker in ready["workers"] if worker["role"] == "decode"]
    os.kill(pid, signal.SIGKILL)
    assert await asyncio.gather(*(wrong_answers(router, prompts) for router in (again, other))) == [[], []]
    server.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(server.process.wait, STOP_LIMIT_S) == 0
    assert second.poll() is None, "a router outlives the deployment"
    second.send_signal(signal.SIGINT)
    assert second.wait(STOP_LIMIT_S) == 0


async def test_a_router_that_is_not_there_is_named() -> None:
    with pytest.raises(
        RouterError, match=r"no router answers at 127\.0\.0\.1:1 \(router\.external\): start it there"
    ):
        await ExternalRouters.connect(["127.0.0.1:1"], None)


def test_a_router_that_cannot_start_says_why() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "router", "--http", "192.0.2.1:80"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "cannot listen on 192.0.2.1:80 (http)" in done.stderr) == (3, True), done.stderr
