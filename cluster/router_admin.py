"""A router as whoever runs the workers sees it: over its admin port."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import grpc
from prelay.v1 import admin_pb2, admin_pb2_grpc, worker_pb2

from cluster.errors import RouterError, WorkerError
from engine.link_secret import proof_of
from engine.tls import Identity, dial

_TIMEOUT_S = 15.0


class Routers(Protocol):
    """One router, or several that have the same workers."""

    async def register(self, info: worker_pb2.WorkerInfo, secret: str) -> None:
        """Dial a worker, with its secret. Raises WorkerError with a reason if nobody can attach it."""

    async def lost(self, worker_id: str, epoch: int) -> None:
        """This life of a worker is over; whoever is gone has forgotten it already."""

    async def drain(self, worker_id: str, epoch: int, *, draining: bool) -> int:
        """Whether that life of a worker gets nothing new; returns how many requests it has. Raises
        WorkerError when nobody has it."""
        ...

    async def controlled_at(self, address: str) -> None:
        """Where whoever wants to change the workers finds somebody who does. Raises RouterError."""

    async def forget(self, worker_id: str, epoch: int) -> None:
        """A worker is no longer part of the deployment."""

    async def attached(self) -> set[tuple[str, int]]:
        """(worker id, epoch) of every worker that all of them can use now. Raises WorkerError."""
        ...

    async def status(self) -> admin_pb2.GetStatusResponse:
        """Raises WorkerError."""
        ...

    async def workload(self) -> admin_pb2.GetWorkloadResponse:
        """What has come lately. Raises WorkerError."""
        ...


class RouterAdmin:
    """One router. address: HOST:PORT of its admin port."""

    def __init__(self, address: str, identity: Identity | None) -> None:
        self.address = address
        self._identity = identity

    async def register(self, info: worker_pb2.WorkerInfo, secret: str) -> None:
        """Make the router dial a worker, with its secret. Raises WorkerError with the router's reason if it
        cannot attach."""
        request = admin_pb2.RegisterWorkerRequest(
            worker_id=info.worker_id,
            epoch=info.epoch,
            role=info.role,
            address=info.address,
            proof=proof_of(secret, info.worker_id, info.epoch),
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
        async with dial(self.address, self._identity) as channel:
            stub = admin_pb2_grpc.RouterAdminStub(channel)
            return await getattr(stub, method)(request, timeout=_TIMEOUT_S)
