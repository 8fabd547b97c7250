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

_TIMEOUT_S = 2.0
"""One whose host is gone must not keep the others waiting."""


class ExternalRouters:
    """Several routers as one."""

    def __init__(self, routers: Sequence[RouterAdmin]) -> None:
        """Made by `connect`."""
        self._routers = routers
        self._controller = ""
        # The epoch of each worker that they were told of, and of those that are to get nothing new.
        self._told: dict[str, int] = {}
        self._drained: dict[str, int] = {}
        # Those that did not answer when they were last asked.
        self._silent: set[str] = set()

    @classmethod
    async def connect(cls, addresses: Sequence[str], identity: Identity | None) -> Self:
        """addresses: HOST:PORT of their admin ports. Raises RouterError if none of them answers."""
        routers = cls([RouterAdmin(address, identity) for address in addresses])
        if not await routers._looks():
            raise RouterError(
                f"no router answers at {', '.join(addresses)} (router.external): start it there with `prelay "
                "router`, or give the address that it shows as admin"
            )
        return routers

    def use(self, routers: Sequence[RouterAdmin]) -> None:
        """From now on these."""
        self._routers = routers

    async def register(self, info: worker_pb2.WorkerInfo, secret: str) -> None:
        """With all that answer. Raises WorkerError if one of these refuses it, or none answers."""

        async def one(router: RouterAdmin) -> None:
            try:
                await router.register(info, secret)
                if self._drained.get(info.worker_id) == info.epoch:
                    await router.drain(info.worker_id, info.epoch, draining=True)
                if self._controller:  # it may have been started anew
                    await router.controlled_at(self._controller)
            except (WorkerError, RouterError) as error:
                raise WorkerError(f"{router.address}: {error}") from error

        self._told[info.worker_id] = info.epoch
        there = [router for router, _ in await self._looks()]
        if not there:
            raise WorkerError("no router answers")
        await asyncio.gather(*map(one, there))

    async def lost(self, worker_id: str, epoch: int) -> None:
        await self._tell(lambda router: router.lost(worker_id, epoch))

    async def forget(self, worker_id: str, epoch: int) -> None:
        self._told.pop(worker_id, None)
        self._drained.pop(worker_id, None)
        await self._tell(lambda router: router.forget(worker_id, epoch))

    async def drain(self, worker_id: str, epoch: int, *, draining: bool) -> int:
        """Of all together; one that has just stopped to answer counts as if it still had something. Raises
        WorkerError when nobody has it."""
        if draining:
            self._drained[worker_id] = epoch
        else:
            self._drained.pop(worker_id, None)
        before = set(self._silent)
        found = await self._tell(lambda router: router.drain(worker_id, epoch, draining=draining))
        if not found:
            raise WorkerError(f"no router has worker {worker_id}")
        return sum(found) + len(self._silent - before)

    async def controlled_at(self, address: str) -> None:
        """Raises RouterError if not one of them hears it."""
        self._controller = address
        if not await self._tell(lambda router: router.controlled_at(address)):
            raise RouterError("no router takes the controller's address")

    async def attached(self) -> set[tuple[str, int]]:
        """Those that every router has that answers. Raises WorkerError if none does."""
        looks = await self._looks()
        if not looks:
            raise WorkerError("no router answers")
        return set.intersection(
            *(
                {(worker.info.worker_id, worker.info.epoch) for worker in status.workers if worker.up}
                for _, status in looks
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
        told = list(self._told.items())
        await asyncio.gather(*(self.forget(worker_id, epoch) for worker_id, epoch in told))

    async def _looks(self) -> list[tuple[RouterAdmin, admin_pb2.GetStatusResponse]]:
        """The status of each that answers: of all, so those that were silent count again when they do."""
        found = await asyncio.gather(*(self._asked(router, router.status()) for router in self._routers))
        return [(router, one) for router, said in zip(self._routers, found, strict=True) for one in said]

    async def _tell(self, ask: Callable[[RouterAdmin], Awaitable[T]]) -> list[T]:
        """What those say that are there: who was silent the last time is not waited for."""
        there = [router for router in self._routers if router.address not in self._silent]
        found = await asyncio.gather(*(self._asked(router, ask(router)) for router in there))
        return [one for said in found for one in said]

    async def _asked(self, router: RouterAdmin, answer: Awaitable[T]) -> list[T]:
        """What it says; nothing if it does not, or cannot."""
        try:
            said = await asyncio.wait_for(answer, _TIMEOUT_S)
        except TimeoutError:
            self._silent.add(router.address)
            return []
        except (WorkerError, RouterError):
            return []
        self._silent.discard(router.address)
        return [said]
