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
from pathlib import Path
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
from tests.cluster.test_three_hosts import DEPLOY

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


class RayHosts:
    """A head without work and a node, started by the script that operators use, both here."""

    def __init__(self, folder: Path, state: dict[str, str], options: tuple[str, ...]) -> None:
        """state, options: of the environment and the head's command line, where it keeps its state."""
        self._folder = folder
        self._state = state
        self._options = options
        (self._port,) = free_ports(1)
        self.address = f"127.0.0.1:{self._port}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start_head(self) -> None:
        # The node beside it would be taken for a head that still runs.
        (self._folder / "ray_current_cluster").unlink(missing_ok=True)
        self._start("head", "head", f"--port={self._port}", f"--temp-dir={self._folder}", *self._options)
        while not _listens(self._port):
            assert self._processes["head"].poll() is None, (self._folder / "head.log").read_text()
            time.sleep(0.1)

    def start_node(self) -> None:
        self._start("node", "prefill", self.address, "--num-cpus=2")

    def kill(self, name: str) -> None:
        """All of its processes at once."""
        process = self._processes.pop(name)
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(process.pid)
            for one in [top, *top.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        process.wait()

    def kill_all(self) -> None:
        for name in list(self._processes):
            self.kill(name)

    def _start(self, name: str, role: str, *options: str) -> None:
        words = [option for option in options if not option.startswith("--")]
        options = tuple(option for option in options if option.startswith("--"))
        environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | self._state
        with (self._folder / f"{name}.log").open("a") as log:
            self._processes[name] = subprocess.Popen(
                [
                    str(DEPLOY / "launch.sh"), role, *words, "--", *options, "--node-ip-address=127.0.0.1",
                    "--object-store-memory=100000000", "--block",
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **environment},
                start_new_session=True,
            )  # fmt: skip


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def head_state(kind: str, folder: Path) -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    """Environment and options by which it outlives the head."""
    if kind == "directory":
        (folder / "state").mkdir()
        yield {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(folder / "state")}, ()
        return
    if (binary := shutil.which("redis-server")) is None:
        pytest.skip("there is no redis-server (Debian's package redis-server)")
    (port,), password = free_ports(1), "of-a-redis-under-test"
    with (folder / "redis.log").open("w") as log:
        options = ("--port", str(port), "--bind", "127.0.0.1", "--save", "", "--requirepass", password)
        redis = subprocess.Popen([binary, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        while not _listens(port):
            assert redis.poll() is None, (folder / "redis.log").read_text()
            time.sleep(0.05)
        yield {"RAY_REDIS_ADDRESS": f"127.0.0.1:{port}"}, (f"--redis-password={password}",)
    finally:
        redis.kill()
        redis.wait()


@pytest.fixture(params=["directory", "redis"])
def ray_hosts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayHosts]:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-a-detached-deployment-under-test")
    folder = Path(tempfile.mkdtemp(prefix="prelay-", dir="/tmp"))  # Ray's sockets need a short path
    with contextlib.ExitStack() as ends:
        ends.callback(shutil.rmtree, folder)
        hosts = RayHosts(folder, *ends.enter_context(head_state(request.param, folder)))
        ends.callback(hosts.kill_all)
        hosts.start_head()
        hosts.start_node()
        yield hosts


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def kill_actor(name: str) -> list[psutil.Process]:
    """The only one of that class. Returns the processes that it had started, which end now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{name}"):
                found.append(process)
    (actor,) = found
    children: list[psutil.Process] = actor.children()
    actor.kill()
    return children


async def until(condition: Callable[[], Any]) -> None:
    while not await condition():  # noqa: ASYNC110
        await asyncio.sleep(0.1)


@pytest.mark.slow
@pytest.mark.ray
async def test_its_controller_dies_and_takes_over_what_serves(
    ray_hosts: RayHosts, start_server: Callable[..., Server]
) -> None:
    names = ("http", "grpc", "metrics", "admin")
    each = zip(names, free_ports(len(names)), strict=True)
    ports = [text for name, port in each for text in (f"--{name}", f"127.0.0.1:{port}")]
    beside_workers = ("--set", "router.actors=1", "--set", 'router.resources={"prefill": 1}')
    joined = ("--ray-address", ray_hosts.address, "--set", "ray.wait_s=30")
    detached = ("--detach", "trial", *joined, *beside_workers, *LENIENT)
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
    await until(lambda: _roles_are(router, {"prefill-0": "prefill", "decode-0": "mixed"}))
    assert await wrong_answers(router, prompts) == []

    # And its router, which is told of all workers anew.
    ending = kill_actor("RouterHost")
    assert ending, "the router is its child"
    await asyncio.to_thread(psutil.wait_procs, ending)
    await until(lambda: _has_workers(router, 2))
    assert await wrong_answers(router, prompts) == []

    # Without Ray's head answers go on; who dies then comes back when it does.
    ray_hosts.kill("head")
    asking = asyncio.create_task(wrong_answers(router, prompts))
    lives = {one.info.worker_id: one.info for one in (await status_of(router)).workers}
    os.kill(lives["decode-0"].pid, signal.SIGKILL)
    await asyncio.sleep(1.0)
    ray_hosts.start_head()
    await until(lambda: _lives_again(router, "decode-0", lives["decode-0"].epoch))
    assert await asking == []
    assert await wrong_answers(router, prompts) == []

    stop = ("stop", "trial", "--ray-address", ray_hosts.address)
    assert await _run(*stop) == (0, "deployment trial has ended; it had 2 workers\n")
    assert not _listens(int(router["admin"].rpartition(":")[2]))
    code, written = await _run(*stop)
    assert (code, "there is no deployment trial" in written) == (2, True), written


async def _controller_is_not(router: Ready, first: str) -> bool:
    return (await status_of(router)).controller not in ("", first)


async def _roles_are(router: Ready, wanted: dict[str, str]) -> bool:
    return await roles(router) == wanted


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
