"""`prelay.v1.Controller`: how operators change a running deployment, beside the router's admin port.

Where it listens is free; whoever asks the router for its status is told.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Self

import grpc
from prelay.v1 import control_pb2, control_pb2_grpc, worker_pb2

from cluster.errors import ClusterError, ConfigError, UnknownWorkerError
from cluster.reshape import Reshape
from cluster.roles import ROLE_NAMES
from cluster.sections import parse_host_port
from engine.tls import Identity, listen

_Context = grpc.aio.ServicerContext[Any, Any]

_CODES: tuple[tuple[type[ClusterError], grpc.StatusCode], ...] = (
    (UnknownWorkerError, grpc.StatusCode.NOT_FOUND),
    (ConfigError, grpc.StatusCode.FAILED_PRECONDITION),
    (ClusterError, grpc.StatusCode.UNAVAILABLE),
)


class ControlApi(control_pb2_grpc.ControllerServicer):
    """The servicer: one change at a time."""

    def __init__(self, reshape: Reshape) -> None:
        self._reshape = reshape

    async def SetRole(
        self, request: control_pb2.SetRoleRequest, context: _Context
    ) -> AsyncIterator[control_pb2.ChangeProgress]:
        """Lines, until the worker serves its new role."""
        await self._check_drain(request.drain_s, context)
        await self._check_role(request.role, context)
        lines = self._reshape.set_role(request.worker_id, request.role, request.drain_s)
        async for progress in self._change(lines, context):
            yield progress

    async def Drain(
        self, request: control_pb2.DrainRequest, context: _Context
    ) -> AsyncIterator[control_pb2.ChangeProgress]:
        """Lines, until the worker is empty or the time is over."""
        await self._check_drain(request.drain_s, context)
        lines = self._reshape.drain(request.worker_id, request.drain_s, undo=request.undo)
        async for progress in self._change(lines, context):
            yield progress

    async def SetPools(
        self, request: control_pb2.SetPoolsRequest, context: _Context
    ) -> AsyncIterator[control_pb2.ChangeProgress]:
        """Lines, until there are as many workers as are wanted."""
        await self._check_drain(request.drain_s, context)
        for pool in request.pools:
            await self._check_role(pool.role, context)
        wanted = {pool.role: pool.replicas for pool in request.pools}
        lines = self._reshape.set_pools(wanted, request.drain_s, dry_run=request.dry_run)
        async for progress in self._change(lines, context):
            yield progress

    async def Renew(
        self, request: control_pb2.RenewRequest, context: _Context
    ) -> AsyncIterator[control_pb2.ChangeProgress]:
        """Lines, until all processes are new."""
        await self._check_drain(request.drain_s, context)
        lines = self._reshape.renew(list(request.worker_ids), request.drain_s, dry_run=request.dry_run)
        async for progress in self._change(lines, context):
            yield progress

    async def _change(
        self, lines: AsyncGenerator[str, None], context: _Context
    ) -> AsyncIterator[control_pb2.ChangeProgress]:
        if self._reshape.changing.locked():
            await context.abort(
                grpc.StatusCode.ABORTED, "another change is being made: try again when it is done"
            )
        async with self._reshape.changing:
            try:
                async with aclosing(lines):
                    async for line in lines:
                        yield control_pb2.ChangeProgress(line=line)
            except ClusterError as error:
                code = next(code for kind, code in _CODES if isinstance(error, kind))
                await context.abort(code, str(error))

    async def _check_drain(self, drain_s: float, context: _Context) -> None:
        if not (math.isfinite(drain_s) and drain_s >= 0):
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"drain_s is {drain_s}: a number of seconds is needed"
            )

    async def _check_role(self, role: worker_pb2.Role, context: _Context) -> None:
        if role not in ROLE_NAMES:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"there is no role {role}: give prefill, decode or mixed"
            )


class ControlServer:
    """Listens from `start` to `stop`. address: HOST:PORT."""

    def __init__(self, server: grpc.aio.Server, address: str) -> None:
        self._server = server
        self.address = address

    @classmethod
    async def start(cls, reshape: Reshape, beside: str, identity: Identity | None = None) -> Self:
        """beside: HOST:PORT of the router's admin port, whose host it shares. identity: None is without
        TLS."""
        host, _ = parse_host_port(beside)
        literal = f"[{host}]" if ":" in host else host
        server = grpc.aio.server()
        control_pb2_grpc.add_ControllerServicer_to_server(ControlApi(reshape), server)
        port = listen(server, f"{literal}:0", identity)
        await server.start()
        return cls(server, f"{literal}:{port}")

    async def stop(self) -> None:
        """Changes under way are broken off."""
        await self._server.stop(grace=0)
