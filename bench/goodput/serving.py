"""A deployment under measurement, in a process tree of its own.

The process is the one that runs a deployment under `prelay serve`, so workers get their cores as they do
there. It stops when its standard input ends: when we close it, and when we are gone, however that came.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bench.errors import MeasurementError
from cluster.config import ServeConfig, child_environment
from cluster.guard import GRACE_S
from cluster.orders import Order
from cluster.process_tree import descendants

T = TypeVar("T")

_LAST_LINES = 12


@dataclass(frozen=True, slots=True)
class Served:
    """grpc, metrics, admin: HOST:PORT. while_up: the result of some work, as long as the deployment is
    there."""

    grpc: str
    metrics: str
    admin: str
    _process: asyncio.subprocess.Process
    _said: collections.deque[str]

    async def while_up(self, work: Coroutine[Any, Any, T]) -> T:
        """Raises MeasurementError if the deployment ends before the work does."""
        end, task = asyncio.create_task(self._process.wait()), asyncio.create_task(work)
        try:
            await asyncio.wait((end, task), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _ended(self._process, self._said)
            return await task
        finally:
            for one in (end, task):
                one.cancel()
            await asyncio.gather(end, task, return_exceptions=True)


@asynccontextmanager
async def serving(config: ServeConfig, on_line: Callable[[str], None]) -> AsyncIterator[Served]:
    """config: resolved and checked. on_line: told what the deployment says while it starts and runs.

    Raises MeasurementError if it does not start. Nothing of it is left afterwards.
    """
    # Not under $TMPDIR: Ray puts sockets there, and their paths must stay below 108 characters.
    folder = Path(tempfile.mkdtemp(prefix="prelay-", dir="/tmp"))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "cluster.child", "serve", str(folder)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=child_environment(local_ray=config.ray.address is None),
        start_new_session=True,  # Ctrl-C is for us alone
    )
    said: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
    ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
    listening = asyncio.gather(_listen(process, said, on_line), _await_ready(process, ready, said, on_line))
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended, which is seen next
            process.stdin.write(Order(config, as_json=True, debug=False).to_json() + b"\n")
            await process.stdin.drain()
        await asyncio.wait((ready, listening), return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            await process.wait()
            raise _ended(process, said)
        addresses = ready.result()
        yield Served(addresses["grpc"], addresses["metrics"], addresses["admin"], process, said)
    finally:
        try:
            await _stop(process)
        finally:  # after a second Ctrl-C, too: it ends by itself then, as nothing holds its input open
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            shutil.rmtree(folder, ignore_errors=True)


async def _listen(
    process: asyncio.subprocess.Process, said: collections.deque[str], on_line: Callable[[str], None]
) -> None:
    assert process.stderr is not None
    async for raw in process.stderr:
        line = raw.decode(errors="replace").rstrip()
        said.append(line)
        on_line(line)


async def _await_ready(
    process: asyncio.subprocess.Process,
    ready: asyncio.Future[dict[str, Any]],
    said: collections.deque[str],
    on_line: Callable[[str], None],
) -> None:
    """Reads standard output to its end: Ray may write there, too, before and after."""
    assert process.stdout is not None
    async for raw in process.stdout:
        line = raw.decode(errors="replace").rstrip()
        if not ready.done() and line.startswith('{"event": "ready"'):
            ready.set_result(json.loads(line))
        else:
            said.append(line)
            on_line(line)


async def _stop(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(GRACE_S):
            await process.wait()
    except TimeoutError:
        # The process itself last: as long as it lives, it is the parent of all that is orphaned below it.
        for pid in (*descendants(process.pid), process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await process.wait()


def _ended(process: asyncio.subprocess.Process, said: collections.deque[str]) -> MeasurementError:
    words = "\n".join(said) or "it said nothing"
    return MeasurementError(f"the deployment has ended with exit code {process.returncode}:\n{words}")
