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
from typing import TYPE_CHECKING, Any, cast

import pytest
from prelay.v1 import admin_pb2, worker_pb2

from cluster import external_routers
from cluster.demo.prompts import demo_prompts
from cluster.errors import RouterError, WorkerError
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
    assert not (await status_of(other)).workers
    second.send_signal(signal.SIGINT)
    assert second.wait(STOP_LIMIT_S) == 0


class Admin:
    """A RouterAdmin. gone: it does not answer."""

    def __init__(self, *workers: tuple[str, int]) -> None:
        self.address = "10.0.0.1:9091"
        self.workers = set(workers)
        self.log: list[str] = []
        self.gone = self.refuses = self.hangs = self.dies_early = False

    async def status(self) -> admin_pb2.GetStatusResponse:
        if self.gone:
            raise WorkerError("it does not answer")
        if self.hangs:
            await asyncio.Event().wait()
        infos = [worker_pb2.WorkerInfo(worker_id=name, epoch=epoch) for name, epoch in self.workers]
        return admin_pb2.GetStatusResponse(
            workers=[admin_pb2.WorkerStatus(info=info, up=True) for info in infos]
        )

    async def register(self, info: worker_pb2.WorkerInfo, secret: str) -> None:
        if self.gone:
            raise WorkerError(f"{info.worker_id} cannot be used")
        if self.refuses:
            raise WorkerError("another model")
        self.workers.add((info.worker_id, info.epoch))

    async def drain(self, worker_id: str, epoch: int, *, draining: bool) -> int:
        if self.gone:
            raise WorkerError("it does not answer")
        if self.hangs:
            await asyncio.Event().wait()
        self.log.append(f"{'drain' if draining else 'undrain'} {worker_id}")
        return 2

    async def controlled_at(self, address: str) -> None:
        if self.gone or self.dies_early:
            raise RouterError("it does not answer")
        self.log.append(f"controlled at {address}")

    async def forget(self, worker_id: str, epoch: int) -> None:
        self.workers.discard((worker_id, epoch))


async def test_one_that_is_gone_is_left_alone_and_told_anew_when_it_is_back() -> None:
    first, second = Admin(("p0", 1)), Admin(("p0", 1))
    second.address = "10.0.0.2:9091"
    routers = ExternalRouters(cast(Any, (first, second)))
    await routers.controlled_at("10.0.0.9:1")
    await routers.register(worker_pb2.WorkerInfo(worker_id="d0", epoch=1), "")
    assert await routers.attached() == {("p0", 1), ("d0", 1)}
    assert await routers.drain("d0", 1, draining=True) == 4
    await routers.drain("d0", 1, draining=False)
    first.gone = True
    assert await routers.attached() == {("p0", 1), ("d0", 1)}
    assert await routers.drain("d0", 1, draining=True) == 2
    await routers.register(worker_pb2.WorkerInfo(worker_id="d1", epoch=1), "")
    first.gone, first.workers = False, set()
    assert await routers.attached() == set(), "so all of them are registered again"
    first.log.clear()
    await routers.register(worker_pb2.WorkerInfo(worker_id="d1", epoch=1), "")
    assert (first.workers, first.log) == ({("d1", 1)}, ["controlled at 10.0.0.9:1"])
    # What was to be kept empty is so for who is back, too.
    await routers.drain("d1", 1, draining=True)
    first.log.clear()
    await routers.register(worker_pb2.WorkerInfo(worker_id="d1", epoch=1), "")
    assert first.log == ["drain d1", "controlled at 10.0.0.9:1"]
    await routers.stop()
    assert second.workers == {("p0", 1)}, "those that others told it of stay"


async def test_when_all_are_gone_that_is_an_error() -> None:
    router = Admin()
    routers, router.gone = ExternalRouters(cast(Any, (router, router))), True
    with pytest.raises(WorkerError, match="no router answers"):
        await routers.attached()
    with pytest.raises(WorkerError, match="no router answers"):
        await routers.register(worker_pb2.WorkerInfo(worker_id="d0", epoch=1), "")
    with pytest.raises(RouterError, match="no router takes the controller's address"):
        await routers.controlled_at("10.0.0.9:1")


async def test_who_refuses_a_worker_is_not_passed_over() -> None:
    """As one with another model would be without workers for ever, and nobody would know."""
    one, other = Admin(), Admin()
    other.refuses = True
    routers = ExternalRouters(cast(Any, (one, other)))
    with pytest.raises(WorkerError, match=r"10\.0\.0\.1:9091: another model"):
        await routers.register(worker_pb2.WorkerInfo(worker_id="d0", epoch=1), "")


async def test_one_that_dies_while_it_is_told_is_an_error_of_that_worker() -> None:
    """Which is tried again; an error of the router would end the deployment."""
    router = Admin()
    routers = ExternalRouters(cast(Any, (router,)))
    await routers.controlled_at("10.0.0.9:1")
    router.dies_early = True
    with pytest.raises(WorkerError, match="it does not answer"):
        await routers.register(worker_pb2.WorkerInfo(worker_id="d0", epoch=1), "")


async def test_one_that_hangs_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_routers, "_TIMEOUT_S", 0.05)
    one, other = Admin(("d0", 1)), Admin(("d0", 1))
    other.address, other.hangs = "10.0.0.2:9091", True
    routers = ExternalRouters(cast(Any, (one, other)))
    assert await routers.drain("d0", 1, draining=True) == 3, "it may still have something there"
    assert await routers.drain("d0", 1, draining=True) == 2
    assert await routers.attached() == {("d0", 1)}


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
