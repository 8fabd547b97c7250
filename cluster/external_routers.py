"""Routers that run elsewhere (`prelay router`), told of the same workers.

Each has the workers to itself as far as it knows; what two of them place at once, workers sort out by
refusing what they have no room for. One that is gone is left alone until it answers again, and is then told
of all workers anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NoReturn, Self, TypeVar

from prelay.v1 import admin_pb2, worker_pb2

from cluster.errors import RouterError, WorkerError
from cluster.router_admin import RouterAdmin
from engine.tls import Identity

T = TypeVar("T")

_LOOK_TIMEOUT_S = 3.0


class ExternalRouters:
    """Several routers as one."""

    def __init__(self, routers: Sequence[RouterAdmin]) -> None:
        """Made by `connect`."""
        self._routers = routers
        self._controller = ""
        # The epoch of each worker that they were told of.
        self._told: dict[str, int] = {}

    @classmethod
    async def connect(cls, addresses: Sequence[str], identity: Identity | None) -> Self:
        """addresses: HOST:PORT of their admin ports. Raises RouterError unless all of them answer."""
        routers = [RouterAdmin(address, identity) for address in addresses]
        found = await asyncio.gather(*(_looked(router) for router in routers))
        silent = [router.address for router, status in zip(routers, found, strict=True) if status is None]
        if silent:
            raise RouterError(
                f"no router answers at {', '.join(silent)} (router.external): start it there with `prelay "
                "router`, or give the address that it shows as admin"
            )
        return cls(routers)

    async def register(self, info: worker_pb2.WorkerInfo, secret: str) -> None:
        """With all. Raises WorkerError if not one of them can attach it."""

        async def one(router: RouterAdmin) -> None:
            await router.register(info, secret)
            if self._controller:  # it may have been started anew
                await router.controlled_at(self._controller)

        self._told[info.worker_id] = info.epoch
        await self._any(one)

    async def lost(self, worker_id: str, epoch: int) -> None:
        await asyncio.gather(*(router.lost(worker_id, epoch) for router in self._routers))

    async def forget(self, worker_id: str, epoch: int) -> None:
        self._told.pop(worker_id, None)
        await asyncio.gather(*(router.forget(worker_id, epoch) for router in self._routers))

    async def drain(self, worker_id: str, epoch: int, *, draining: bool) -> int:
        """Of all together. Raises WorkerError when nobody has it."""
        return sum(await self._any(lambda router: router.drain(worker_id, epoch, draining=draining)))

    async def controlled_at(self, address: str) -> None:
        """Raises RouterError if not one of them hears it."""
        self._controller = address
        await self._any(lambda router: router.controlled_at(address))

    async def attached(self) -> set[tuple[str, int]]:
        """Those that every router has that answers. Raises WorkerError if none does."""
        found = await asyncio.gather(*(_looked(router) for router in self._routers))
        answered = [status for status in found if status is not None]
        if not answered:
            raise WorkerError("no router answers")
        return set.intersection(
            *(
                {(worker.info.worker_id, worker.info.epoch) for worker in status.workers if worker.up}
                for status in answered
            )
        )

    async def status(self) -> admin_pb2.GetStatusResponse:
        """Of the first."""
        return await self._routers[0].status()

    async def workload(self) -> admin_pb2.GetWorkloadResponse:
        """Of the first: a configuration with several and a controller is refused."""
        return await self._routers[0].workload()

    async def ended(self) -> NoReturn:
        """Never: they come back, or others take their part."""
        await asyncio.Event().wait()
        raise AssertionError

    async def stop(self) -> None:
        """They go on, without the workers that they were told of."""
        await asyncio.gather(
            *(self.forget(worker_id, epoch) for worker_id, epoch in list(self._told.items()))
        )

    async def _any(self, ask: Callable[[RouterAdmin], Awaitable[T]]) -> list[T]:
        """What those say that can. Raises the first error if nobody can."""
        found = await asyncio.gather(*(ask(router) for router in self._routers), return_exceptions=True)
        for one in found:
            if isinstance(one, BaseException) and not isinstance(one, WorkerError | RouterError):
                raise one
        said = [one for one in found if not isinstance(one, BaseException)]
        if not said:
            raise next(one for one in found if isinstance(one, BaseException))
        return said


async def _looked(router: RouterAdmin) -> admin_pb2.GetStatusResponse | None:
    """Its status; None if it does not answer."""
    try:
        return await asyncio.wait_for(router.status(), _LOOK_TIMEOUT_S)
    except (WorkerError, TimeoutError):
        return None
