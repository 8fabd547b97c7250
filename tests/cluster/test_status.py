"""Asking a router for its status: what comes, and what is said when nothing or something else comes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click.testing
import grpc
import pytest
from prelay.v1 import admin_pb2, admin_pb2_grpc

from cluster.cli import cli
from cluster.errors import NoRouterError
from cluster.status import StatusClient, attainment, status_json
from tests.cluster.status_samples import busy_status


class Admin(admin_pb2_grpc.RouterAdminServicer):
    def GetStatus(
        self, request: admin_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetStatusResponse:
        return busy_status()


@pytest.fixture
def router() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1))
    admin_pb2_grpc.add_RouterAdminServicer_to_server(Admin(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def run(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli, arguments, standalone_mode=False)


def test_attainment_leaves_only_the_cancelled_out() -> None:
    outcomes = {"good": 3, "ttft_miss": 1, "rejected": 1, "error": 1, "cancelled": 50}
    assert attainment(outcomes) == 0.5
    assert attainment({"cancelled": 1}) is None
    assert attainment({"rejected": 1}) == 0.0


def test_status_as_json() -> None:
    found = status_json(busy_status())
    assert json.loads(json.dumps(found)) == found
    assert [each["worker_id"] for each in found["workers"]] == [
        "prefill-0", "prefill-1", "decode-2", "decode-10", "mixed-0",
    ]  # fmt: skip
    assert [each["state"] for each in found["workers"]] == ["up", "down", "suspected", "up", "up"]
    assert found["workers"][3]["kv_blocks"] == {
        "all": 100, "free": 0, "owned": 50, "leased": 3, "cached": 20,
    }  # fmt: skip
    assert found["attainment"] == found["classes"]["standard"]["attainment"] == 0.75
    assert found["classes"]["batch"]["attainment"] is None
    assert found["ttft"] == {"p50_s": 0.2, "p90_s": 0.5, "p99_s": 1.75}
    assert found["tpot"] is None


def test_the_command_prints_a_table_or_json(router: str) -> None:
    assert json.loads(run("status", "--admin", router, "--json").output) == status_json(busy_status())
    assert "policy goodput" in run("status", "--admin", router).output


def test_top_prints_one_status_where_there_is_no_terminal(router: str) -> None:
    assert "policy goodput" in run("top", "--admin", router).output


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_top_gives_the_terminal_back_when_it_is_ended(router: str, signum: signal.Signals) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "cluster.cli", "top", "--admin", router]
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    written = b""
    while b"goodput" not in written:
        written += os.read(ours, 65536)
    process.send_signal(signum)
    with contextlib.suppress(OSError):  # how Linux says that nobody has the terminal open any more
        while part := os.read(ours, 65536):
            written += part
    os.close(ours)
    assert process.wait() == 0
    enter, leave = b"\x1b[?1049h", b"\x1b[?1049l"
    assert written.startswith(enter)
    assert written.endswith(leave)


@pytest.mark.parametrize("command", ["status", "top"])
def test_no_router_is_said_with_what_to_do(command: str) -> None:
    address = closed_port()
    result = run(command, "--admin", address)
    assert isinstance(result.exception, NoRouterError)
    assert f"no router answers at {address}: start one with `prelay serve`" in str(result.exception)


def test_something_else_is_not_taken_for_a_router() -> None:
    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    with (
        StatusClient(f"127.0.0.1:{port}") as client,
        pytest.raises(NoRouterError, match="not the admin port"),
    ):
        client.fetch()
    other.stop(0).wait()


def test_an_http_server_is_not_taken_for_a_router() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as web:
        serving = threading.Thread(target=web.serve_forever)
        serving.start()
        try:
            with StatusClient(f"127.0.0.1:{web.server_port}") as client, pytest.raises(NoRouterError):
                client.fetch()
        finally:
            web.shutdown()
            serving.join()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("status", "--admin", "9091"), "'9091' is not HOST:PORT"),
        (("top", "--admin", "http://localhost:9091"), "has a scheme"),
        (("top", "--interval", "0"), "0.0 is not in the range"),
        (("top", "--interval", "nan"), "nan"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments: tuple[str, ...], complaint: str) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, click.UsageError)
    assert complaint in result.exception.format_message()


@pytest.mark.parametrize("command", ["status", "top"])
def test_help_has_examples_and_exit_codes(command: str) -> None:
    text = run(command, "--help").output
    assert f"  prelay {command}\n" in text
    assert "  1  no router answers" in text


def test_the_example_configuration_has_the_port_that_is_asked(tmp_path: Path) -> None:
    assert "127.0.0.1:9091" in run("status", "--help").output
    assert "admin: 127.0.0.1:9091" in run("config", "--show").output
