"""The router as a child process: start it, tell it of workers, notice its end, stop it.

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
from typing import Any, Self

import grpc
from prelay.v1 import admin_pb2, admin_pb2_grpc, worker_pb2

from cluster.errors import AddressInUseError, RouterError, WorkerError
from engine.tls import Identity, dial

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 3.5
_ADMIN_TIMEOUT_S = 15.0
_EXIT_ADDRESS_IN_USE = 3


@dataclass(frozen=True, slots=True)
class RouterAddresses:
    """Where the router listens, each as HOST:PORT with the real port."""

    http: str
    grpc: str
    metrics: str
    admin: str


class RouterProcess:
    """A running router."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        addresses: RouterAddresses,
        relay: _Relay,
        identity: Identity | None,
    ) -> None:
        self.addresses = addresses
        self._process = process
        self._relay = relay
        self._identity = identity

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
        except TimeoutError:
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

    async def register(self, info: worker_pb2.WorkerInfo, secret: str) -> None:
        """Make the router dial a worker, with its secret. Raises WorkerError with the router's reason if it
        cannot attach."""
        request = admin_pb2.RegisterWorkerRequest(
            worker_id=info.worker_id,
            epoch=info.epoch,
            role=info.role,
            address=info.address,
            secret=secret,
        )
        try:
            await self._ask("RegisterWorker", request)
        except grpc.aio.AioRpcError as error:
            raise WorkerError(
                f"the router cannot use worker {info.worker_id} at {info.address}: "
                f"{error.code().name}: {error.details()}"
            ) from error

    async def lost(self, worker_id: str, epoch: int) -> None:
        """Tell the router that this life of a worker is over; one that is gone has forgotten it already."""
        await self._remove(worker_id, epoch, comes_back=True)

    async def drain(self, worker_id: str, epoch: int, *, draining: bool) -> int:
        """Whether that life of a worker gets nothing new; returns how many requests it has. Raises
        WorkerError when the router does not have it."""
        request = admin_pb2.DrainWorkerRequest(worker_id=worker_id, epoch=epoch, draining=draining)
        try:
            answer = await self._ask("DrainWorker", request)
        except grpc.aio.AioRpcError as error:
            raise WorkerError(f"the router cannot drain worker {worker_id}: {error.details()}") from error
        return int(answer.live_requests)

    async def controlled_at(self, address: str) -> None:
        """Tell the router where whoever wants to change the workers finds somebody who does. Raises
        RouterError."""
        try:
            await self._ask("SetController", admin_pb2.SetControllerRequest(address=address))
        except grpc.aio.AioRpcError as error:
            raise RouterError(
                f"the router does not take the controller's address: {error.details()}"
            ) from error

    async def forget(self, worker_id: str, epoch: int) -> None:
        """Tell the router that a worker is no longer part of the deployment."""
        await self._remove(worker_id, epoch, comes_back=False)

    async def attached(self) -> set[tuple[str, int]]:
        """(worker id, epoch) of every worker that the router can use now. Raises WorkerError."""
        status = await self.status()
        return {(worker.info.worker_id, worker.info.epoch) for worker in status.workers if worker.up}

    async def _remove(self, worker_id: str, epoch: int, *, comes_back: bool) -> None:
        request = admin_pb2.RemoveWorkerRequest(worker_id=worker_id, epoch=epoch, comes_back=comes_back)
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self._ask("RemoveWorker", request)

    async def status(self) -> admin_pb2.GetStatusResponse:
        """Raises WorkerError."""
        try:
            status: admin_pb2.GetStatusResponse = await self._ask("GetStatus", admin_pb2.GetStatusRequest())
        except grpc.aio.AioRpcError as error:
            raise WorkerError(f"the router does not say which workers it has: {error.details()}") from error
        return status

    async def workload(self) -> admin_pb2.GetWorkloadResponse:
        """What has come lately. Raises WorkerError."""
        try:
            workload: admin_pb2.GetWorkloadResponse = await self._ask(
                "GetWorkload", admin_pb2.GetWorkloadRequest()
            )
        except grpc.aio.AioRpcError as error:
            raise WorkerError(f"the router does not say what has come: {error.details()}") from error
        return workload

    async def _ask(self, method: str, request: object) -> Any:
        """Dialled anew each time, so with the certificates of the day. Raises grpc.aio.AioRpcError."""
        async with dial(self.addresses.admin, self._identity) as channel:
            stub = admin_pb2_grpc.RouterAdminStub(channel)
            return await getattr(stub, method)(request, timeout=_ADMIN_TIMEOUT_S)

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
