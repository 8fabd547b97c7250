"""A whole deployment under test: `prelay serve` in a process of its own, and what is left of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

STOP_LIMIT_S = 10.0
"""Within this everything must be gone, whatever happened."""

_FREE = "127.0.0.1:0"
FREE_PORTS = ("--http", _FREE, "--grpc", _FREE, "--metrics", _FREE, "--admin", _FREE)
_MARK = "PRELAY_TEST_TREE"


@dataclass(frozen=True)
class Server:
    """A `prelay serve` that has been started; its standard error goes to the file `log`."""

    process: subprocess.Popen[str]
    mark: str
    log: Path
    shared_memory_before: frozenset[str]

    def ready(self) -> dict[str, Any]:
        """Blocks until it serves; what it printed then."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"not ready: {self.log.read_text()}"
        message: dict[str, Any] = json.loads(line)
        return message

    def wait_for_log(self, text: str) -> None:
        """Blocks until it has written `text` to standard error."""
        with self.log.open() as lines:
            seen = ""
            while text not in seen:
                assert self.process.poll() is None, f"ended before {text!r}: {seen}"
                seen += lines.read()
                time.sleep(0.01)

    def tree(self) -> list[psutil.Process]:
        """All processes that it has started, directly or not, and itself."""
        return [process for process in psutil.process_iter() if _has_mark(process, self.mark)]

    def assert_gone(self, since: float, ready: dict[str, Any] | None) -> None:
        """Blocks until no process, port or shared memory of it is left, within the limit after `since`."""
        while tree := self.tree():
            assert time.monotonic() - since < STOP_LIMIT_S, f"left: {tree}; {self.log.read_text()}"
            time.sleep(0.05)
        for name in ("http", "grpc", "metrics", "admin") if ready else ():
            host, _, port = ready[name].rpartition(":") if ready else ("", "", "")
            with socket.socket() as probe:
                assert probe.connect_ex((host, int(port))) != 0, f"somebody listens on {name}"
        assert frozenset(os.listdir("/dev/shm")) <= self.shared_memory_before


StartServer = Callable[..., Server]


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """Starts servers with --json and the given arguments; ends at last what the tests have not."""
    servers = []

    def start(*arguments: str, ports: Sequence[str] = FREE_PORTS) -> Server:
        mark = uuid.uuid4().hex
        log = tmp_path_factory.mktemp("serve") / "log"
        before = frozenset(os.listdir("/dev/shm"))
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", "serve", "--json", *ports, *arguments],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, _MARK: mark},
            )
        servers.append(Server(process, mark, log, before))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
        server.process.communicate()
        # What a failed deployment keeps for whoever wants to know why.
        for directory in re.findall(r"are kept in (\S+)", server.log.read_text()):
            shutil.rmtree(directory)


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(_MARK) == mark
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
