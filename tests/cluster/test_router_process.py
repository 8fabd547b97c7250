"""The router as a child process: a real one, without workers."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import pytest
from prelay.v1 import worker_pb2

from cluster import router_process
from cluster.config import demo_model_path
from cluster.demo.run import demo_config
from cluster.errors import AddressInUseError, RouterError, WorkerError
from cluster.process_tree import descendants
from cluster.router_config import router_settings
from cluster.router_process import RouterProcess
from router.settings import RouterSettings


def settings(http: str = "127.0.0.1:0", admin: str = "127.0.0.1:0", checkpoint: str = "") -> str:
    given = router_settings(demo_config(), "INFO")
    return RouterSettings(
        checkpoint=checkpoint or given.checkpoint,
        model_name=given.model_name,
        http=http,
        grpc=given.grpc,
        metrics=given.metrics,
        admin=admin,
    ).to_json()


@pytest.fixture
def on_line() -> Callable[[str], None]:
    lines: list[str] = []
    return lines.append


async def test_it_says_where_it_listens_and_stops(on_line: Callable[[str], None]) -> None:
    router = await RouterProcess.start(settings(), on_line)
    ports = [address.rpartition(":")[2] for address in (router.addresses.http, router.addresses.admin)]
    assert "0" not in ports
    await router.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(router.pid, 0)


async def test_an_address_in_use_and_a_dead_router_are_told(on_line: Callable[[str], None]) -> None:
    router = await RouterProcess.start(settings(), on_line)
    with pytest.raises(AddressInUseError, match=router.addresses.http):
        await RouterProcess.start(settings(http=router.addresses.http), on_line)
    with pytest.raises(AddressInUseError, match=rf"^cannot listen on {router.addresses.admin} \(admin\)"):
        await RouterProcess.start(settings(admin=router.addresses.admin), on_line)
    os.kill(router.pid, signal.SIGKILL)
    assert "exit code -9" in str(await router.ended())
    await router.lost("decode-0", 1)
    await router.stop()


async def test_a_router_that_cannot_start_says_why(on_line: Callable[[str], None]) -> None:
    nowhere = str(demo_model_path() / "nowhere")
    with pytest.raises(RouterError, match="nowhere"):
        await RouterProcess.start(settings(checkpoint=nowhere), on_line)


async def test_one_that_takes_too_long_is_not_left_behind(
    on_line: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_process, "_START_TIMEOUT_S", 0.01)
    before = set(descendants(os.getpid()))
    with pytest.raises(RouterError, match="did not listen within"):
        await RouterProcess.start(settings(), on_line)
    while set(descendants(os.getpid())) - before:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


@pytest.mark.slow
async def test_a_worker_that_cannot_be_reached_is_told(on_line: Callable[[str], None]) -> None:
    router = await RouterProcess.start(settings(), on_line)
    nobody = worker_pb2.WorkerInfo(worker_id="decode-0", epoch=1, role=worker_pb2.ROLE_DECODE)
    nobody.address = "127.0.0.1:1"
    with pytest.raises(WorkerError, match=r"the router cannot use worker decode-0 at 127\.0\.0\.1:1"):
        await router.register(nobody, "")
    await router.stop()
