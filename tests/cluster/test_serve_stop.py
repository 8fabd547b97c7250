"""However `prelay serve` ends, and at whatever moment, nothing of it is left within 10 s."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from tests.cluster.conftest import Server

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_serving_deployment_stops_on_request(
    start_server: Callable[..., Server], signum: signal.Signals
) -> None:
    server = start_server()
    ready = server.ready()
    since = time.monotonic()
    server.process.send_signal(signum)
    server.assert_gone(since, ready)
    assert server.process.wait() == 0


@pytest.mark.parametrize(
    "moment",
    [
        "router: starting",
        "router: ready",
        "ray: starting",
        "ray: ready",
        "importing torch",
        "KV cache",
        "measuring steps",
        "prefill-0: ready",
    ],
)
def test_it_stops_half_way_through_starting(start_server: Callable[..., Server], moment: str) -> None:
    server = start_server()
    server.wait_for_log(moment)
    since = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    server.assert_gone(since, None)
    assert server.process.wait() == 0


def test_it_stops_before_it_has_done_anything(start_server: Callable[..., Server]) -> None:
    server = start_server()
    since = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    server.assert_gone(since, None)


@pytest.mark.parametrize("victim", ["guard", "launcher", "router", "raylet"])
def test_nothing_outlives_a_killed_part(start_server: Callable[..., Server], victim: str) -> None:
    server = start_server()
    ready = server.ready()
    (launcher,) = psutil.Process(server.process.pid).children()
    (raylet,) = [process for process in launcher.children() if process.name() == "raylet"]
    pids = {
        "guard": server.process.pid,
        "launcher": launcher.pid,
        "router": ready["router_pid"],
        "raylet": raylet.pid,
    }
    since = time.monotonic()
    os.kill(pids[victim], signal.SIGKILL)
    server.process.wait()
    server.assert_gone(since, ready)
    assert server.process.returncode == (-signal.SIGKILL if victim == "guard" else 1)
    if victim != "guard":
        assert "prelay: error: " in server.log.read_text()
        assert "Traceback" not in server.log.read_text()


def test_a_killed_start_leaves_nothing(start_server: Callable[..., Server]) -> None:
    server = start_server()
    server.wait_for_log("ray: starting")
    since = time.monotonic()
    server.process.kill()
    server.assert_gone(since, None)
