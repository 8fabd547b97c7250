"""The router as a child process: start it, notice its end, stop it.

It is started first and takes all its ports before it says that it is ready, so an address that is in use is
known before anything else is started.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from cluster.errors import AddressInUseError, RouterError
from cluster.router_admin import RouterAdmin
from engine.tls import Identity

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 3.5
_EXIT_ADDRESS_IN_USE = 3


@dataclass(frozen=True, slots=True)
class RouterAddresses:
    """Where the router listens, each as HOST:PORT with the real port."""

    http: str
    grpc: str
    metrics: str
    admin: str


class RouterProcess(RouterAdmin):
    """A running router of our own."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        addresses: RouterAddresses,
        relay: _Relay,
        identity: Identity | None,
    ) -> None:
        super().__init__(addresses.admin, identity)
        self.addresses = addresses
        self._process = process
        self._relay = relay

    @classmethod
    async def start(
        cls, settings_json: str, on_line: Callable[[str], None], identity: Identity | None = None
    ) -> Self:
        """Start the router and wait until it listens. on_line: told what it writes to standard error.
        identity: if its admin port is to have TLS.

        Raises AddressInUseError or RouterError with the router's own message.
        """
        # -P: a folder called `router` where the user happens to be must not be taken for ours.
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "router",
            settings_json,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        relay = _Relay(process.stderr)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                ready_line = await process.stdout.readline()
                if not ready_line:
                    await process.wait()
                    await relay.drained
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            if not isinstance(error, TimeoutError):
                raise  # cancelled
            raise RouterError(f"the router did not listen within {_START_TIMEOUT_S:.0f} s") from None
        if not ready_line:
            if process.returncode == _EXIT_ADDRESS_IN_USE:
                raise AddressInUseError(relay.last_lines[-1])  # before it gRPC may have said the same its way
            raise RouterError(
                "\n".join(relay.last_lines) or f"the router ended with exit code {process.returncode}"
            )
        relay.forward_to(on_line)
        return cls(process, RouterAddresses(**json.loads(ready_line)), relay, identity)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ended(self) -> RouterError:
        """Wait until the router ends by itself; returns what to say about it."""
        code = await self._process.wait()
        await self._relay.drained
        words = f": {self._relay.last_lines[-1]}" if self._relay.last_lines else ""
        return RouterError(f"the router ended with exit code {code}{words}")

    async def stop(self) -> None:
        """End the router: it ends its clients' streams with an error, or is killed if that takes too long."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        await self._relay.drained


class _Relay:
    """Reads what the router writes to standard error: kept while it starts, passed on afterwards."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self.last_lines: collections.deque[str] = collections.deque(maxlen=20)
        self._on_line: Callable[[str], None] | None = None
        self.drained = asyncio.create_task(self._read(stream))

    def forward_to(self, on_line: Callable[[str], None]) -> None:
        for line in self.last_lines:
            on_line(line)
        self._on_line = on_line

    async def _read(self, stream: asyncio.StreamReader) -> None:
        async for raw in stream:
            line = raw.decode(errors="replace").rstrip()
            self.last_lines.append(line)
            if self._on_line is not None:
                self._on_line(line)
