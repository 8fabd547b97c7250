"""A deployment that lives in a Ray cluster without whoever started it: its controller dies and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc.aio
import psutil
import pytest

from cluster.config_file import load_config, parse_assignment
from cluster.demo.prompts import demo_prompts
from cluster.errors import ConfigError
from cluster.worker_specs import named_worker
from tests.cluster.asking import LENIENT, Ready, status_of, wrong_answers
from tests.cluster.test_role_change import prelay, roles

if TYPE_CHECKING:
    from tests.cluster.conftest import Server

EXTERNAL = 'router.external=["127.0.0.1:9091"]'


@pytest.mark.parametrize(
    ("assignments", "complaint"),
    [
        (["ray.detached=chat", EXTERNAL], "ray.address is not given: a private Ray ends with"),
        (["ray.detached=chat", "ray.address=127.0.0.1:6379"], "set router.actors to 1, or start some with"),
        (["router.actors=2"], "on this machine the router needs no Ray"),
        (["router.actors=2", "ray.address=127.0.0.1:6379", EXTERNAL], "use one of the two"),
        (['router.resources={"router": 1}'], "router.actors is 0: raise it"),
        (
            ["router.actors=2", "ray.address=127.0.0.1:6379", "controller.mode=act"],
            r"there are 2 routers \(router.actors\)",
        ),
        (["ray.detached=Two Words", "ray.address=127.0.0.1:6379", EXTERNAL], r"ray\.detached"),
    ],
)
def test_what_cannot_live_by_itself_is_refused(assignments: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config(None, [parse_assignment(text) for text in assignments])


def test_a_worker_that_was_left_has_the_spec_that_its_name_says() -> None:
    settings = ["prefill.replicas=2", "prefill.kv_cache_tokens=1024", "decode.kv_cache_tokens=2048"]
    config = load_config(None, [parse_assignment(text) for text in settings]).resolved()
    config = config.model_copy(update={"model": config.model.model_copy(update={"max_model_len": 256})})
    assert named_worker(config, "prefill-1").first_slot == 1
    joined = named_worker(config, "decode-7")  # by `prelay scale`
    assert (joined.worker_id, joined.num_blocks * joined.block_size) == ("decode-7", 2048)


@pytest.fixture
def ray_address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a Ray cluster of one node."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-a-detached-deployment-under-test")
    (port,) = free_ports(1)
    folder = tempfile.mkdtemp(prefix="prelay-", dir="/tmp")  # Ray's sockets need a short path
    process = subprocess.Popen(
        [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", "--num-cpus=2",
            "--node-ip-address=127.0.0.1", f"--temp-dir={folder}", "--object-store-memory=100000000",
            "--include-dashboard=false", "--disable-usage-stats", "--block",
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    address = f"127.0.0.1:{port}"
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert process.poll() is None
        time.sleep(0.1)
    yield address
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if one.environ().get("RAY_AUTH_TOKEN") == os.environ["RAY_AUTH_TOKEN"] and one.pid != os.getpid():
                one.kill()
    process.wait()
    shutil.rmtree(folder)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def kill_actor(name: str) -> None:
    """The only one of that class."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{name}"):
                found.append(process)
    (actor,) = found
    actor.kill()


async def until(condition: Callable[[], Any]) -> None:
    while not await condition():  # noqa: ASYNC110
        await asyncio.sleep(0.1)


@pytest.mark.slow
@pytest.mark.ray
async def test_its_controller_dies_and_takes_over_what_serves(
    ray_address: str, start_server: Callable[..., Server]
) -> None:
    names = ("http", "grpc", "metrics", "admin")
    ports = [
        f(name, port)
        for name, port in zip(names, free_ports(len(names)), strict=True)
        for f in (lambda name, _: f"--{name}", lambda _, port: f"127.0.0.1:{port}")
    ]
    detached = ("--detach", "trial", "--ray-address", ray_address, "--set", "router.actors=1", *LENIENT)
    server = start_server(*detached, ports=ports)
    ready = server.ready()
    assert ready["detached"] == "trial"
    (addresses,) = ready["router_actors"]
    router = ready | addresses
    assert await asyncio.to_thread(server.process.wait) == 0, "it goes on without who started it"
    prompts = [replace(prompt, max_tokens=200) for prompt in demo_prompts()[:4]]
    epochs = {worker["worker_id"]: worker["epoch"] for worker in ready["workers"]}

    again = start_server(*detached, ports=ports)
    assert await asyncio.to_thread(again.process.wait) == 1
    assert "deployment trial runs in the Ray cluster" in again.log.read_text()

    # Answers go on while the controller is away; the next one has the same workers in the same lives.
    first = (await status_of(router)).controller
    asking = asyncio.create_task(wrong_answers(router, prompts))
    kill_actor("Controller")
    await until(lambda: _controller_is_not(router, first))
    assert await asking == []
    workers = {one.info.worker_id: one.info.epoch for one in (await status_of(router)).workers}
    assert workers == epochs
    code, written = await prelay(router, "role", "decode-0", "mixed")
    assert code == 0, written

    # It keeps alive what it has taken over, in the role that it has now.
    (pid,) = [worker["pid"] for worker in ready["workers"] if worker["worker_id"] == "decode-0"]
    os.kill(pid, signal.SIGKILL)
    await until(lambda: _lives_again(router, "decode-0", epochs["decode-0"]))
    assert await roles(router) == {"prefill-0": "prefill", "decode-0": "mixed"}
    assert await wrong_answers(router, prompts) == []

    # And its router, which is told of all workers anew.
    kill_actor("RouterHost")
    await until(lambda: _has_workers(router, 2))
    assert await wrong_answers(router, prompts) == []

    stop = ("stop", "trial", "--ray-address", ray_address)
    assert await _run(*stop) == (0, "deployment trial has ended; it had 2 workers\n")
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(router["admin"].rpartition(":")[2]))) != 0
    code, written = await _run(*stop)
    assert (code, "there is no deployment trial" in written) == (2, True), written


async def _controller_is_not(router: Ready, first: str) -> bool:
    return (await status_of(router)).controller not in ("", first)


async def _has_workers(router: Ready, count: int) -> bool:
    try:
        return sum(worker.up for worker in (await status_of(router)).workers) == count
    except grpc.aio.AioRpcError:
        return False


async def _lives_again(router: Ready, worker_id: str, epoch: int) -> bool:
    workers = {one.info.worker_id: one for one in (await status_of(router)).workers}
    return workers[worker_id].up and workers[worker_id].info.epoch > epoch


async def _run(*arguments: str) -> tuple[int, str]:
    """Exit code and what it wrote."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cluster.cli", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    written, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, written.decode()
