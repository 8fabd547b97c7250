"""Routers as Ray actors, on nodes that router.resources and router.labels choose, before the same workers.

Each actor keeps one router process. If it dies, it takes its streams with it; another one is started where
there is room, and told of all workers. Clients find it at the same ports of the node that it is on then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace
from typing import Any, Self

import ray.exceptions
from ray.exceptions import RayActorError, RayTaskError
from ray.util import get_node_ip_address

from cluster.actor_calls import cause, first_line, result
from cluster.config import ServeConfig
from cluster.errors import ClusterError, RouterError
from cluster.external_routers import ExternalRouters
from cluster.ray_cluster import RayCluster
from cluster.reporter import Reporter
from cluster.router_admin import RouterAdmin
from cluster.router_config import router_settings
from cluster.router_process import RouterAddresses, RouterProcess
from cluster.sections import parse_host_port
from engine.tls import Identity
from router.settings import RouterSettings

_START_S = 60.0
_STOP_S = 5.0
_ANSWER_S = 3.0
_AGAIN_S, _MOST_AGAIN_S = 0.5, 10.0
_EVERYWHERE = ("0.0.0.0", "::")

_log = logging.getLogger(__name__)


class RouterHost:
    """The actor."""

    def __init__(self, settings: str) -> None:
        """settings: RouterSettings as JSON. What it says of loopback is for the node's own address."""
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        self._node: str = get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray leaves it untyped
        asked = RouterSettings.from_json(settings)
        # Whoever runs the workers is on another node, perhaps.
        self._settings = replace(asked, admin=_reachable(asked.admin, self._node, loopback=True))
        self._router: RouterProcess | None = None

    async def start(self) -> RouterAddresses:
        """Where it listens, as others reach it. Raises AddressInUseError or RouterError."""
        self._router = await RouterProcess.start(self._settings.to_json(), _log.warning)
        return await self.addresses()

    async def addresses(self) -> RouterAddresses:
        """Raises RouterError before it listens."""
        if self._router is None:
            raise RouterError("the router is still starting")
        found = self._router.addresses
        return RouterAddresses(
            *(
                _reachable(address, self._node, loopback=False)
                for address in (found.http, found.grpc, found.metrics, found.admin)
            )
        )

    async def serving(self) -> None:
        """Until it ends by itself. Raises RouterError."""
        assert self._router is not None
        raise await self._router.ended()

    async def stop(self) -> None:
        """It ends its clients' streams with an error."""
        if self._router is not None:
            await self._router.stop()


def _reachable(address: str, node: str, *, loopback: bool) -> str:
    """HOST:PORT, by the node's own address where it is every one, or the loopback's."""
    host, port = parse_host_port(address)
    if host in _EVERYWHERE or (loopback and host in ("127.0.0.1", "::1", "localhost")):
        return f"[{node}]:{port}" if ":" in node else f"{node}:{port}"
    return address


class RouterActors(ExternalRouters):
    """Several routers as one."""

    def __init__(
        self,
        cluster: RayCluster,
        config: ServeConfig,
        reporter: Reporter,
        identity: Identity | None,
        log_level: str,
    ) -> None:
        """Made by `launch`."""
        super().__init__([])
        self.addresses: list[RouterAddresses] = []
        """Of each, where it listens now."""
        self._cluster = cluster
        self._reporter = reporter
        self._identity = identity
        self._section = config.router
        self._settings = router_settings(config, log_level).to_json()
        # Handles, which Ray types for actors of any class.
        self._actors: list[Any] = [None] * config.router.actors

    @classmethod
    async def launch(
        cls,
        cluster: RayCluster,
        config: ServeConfig,
        reporter: Reporter,
        identity: Identity | None,
        log_level: str,
    ) -> Self:
        """Start all, or go on with those that a detached deployment has. Raises AddressInUseError,
        RouterError or RayError."""
        routers = cls(cluster, config, reporter, identity, log_level)
        for index in range(config.router.actors):
            routers.addresses.append(await routers._found(index) or await routers._begin(index))
        routers.use([RouterAdmin(one.admin, identity) for one in routers.addresses])
        return routers

    async def keep(self) -> None:
        """Start those again that die; for ever."""
        await asyncio.gather(*map(self._keep, range(len(self._actors))))

    async def stop(self) -> None:
        """All end, and with them their clients' streams."""
        await asyncio.gather(*map(self._end, self._actors))

    async def _found(self, index: int) -> RouterAddresses | None:
        actor = await self._cluster.named(f"router-{index}")
        if actor is None:
            return None
        try:
            found: RouterAddresses = await asyncio.wait_for(result(actor.addresses.remote()), _ANSWER_S)
        except (TimeoutError, ray.exceptions.RayError):
            await self._cluster.kill(actor)
            return None
        self._actors[index] = actor
        return found

    async def _begin(self, index: int) -> RouterAddresses:
        what = f"router-{index}"
        self._reporter.progress(what, "starting", None)
        section = self._section
        self._actors[index] = actor = await self._cluster.spawn_alone(
            RouterHost, what, self._settings, resources=section.resources, labels=section.labels
        )
        try:
            found: RouterAddresses = await asyncio.wait_for(result(actor.start.remote()), _START_S)
        except TimeoutError:
            await self._cluster.kill(actor)
            wanted = [*(f"{name} {value:g}" for name, value in section.resources.items())]
            wanted += [f"{name}={value}" for name, value in section.labels.items()]
            raise RouterError(
                f"{what} does not listen after {_START_S:.0f} s: perhaps no node of the Ray cluster has "
                f"{', '.join(wanted) or 'room'} for it (router.resources, router.labels)"
            ) from None
        except ray.exceptions.RayError as error:
            await self._cluster.kill(actor)
            raise _of(what, error) from error
        self._reporter.progress(what, "ready", 1.0)
        return found

    async def _keep(self, index: int) -> None:
        what, delay_s = f"router-{index}", _AGAIN_S
        while True:
            try:
                await result(self._actors[index].serving.remote())
            except ray.exceptions.RayError as error:
                self._reporter.event(str(_of(what, error)))
            await self._cluster.kill(self._actors[index])
            while True:
                await asyncio.sleep(delay_s)
                try:
                    addresses = await self._begin(index)
                except ClusterError as error:
                    self._reporter.event(f"{what} did not start again: {error}")
                    delay_s = min(2 * delay_s, _MOST_AGAIN_S)
                else:
                    delay_s = _AGAIN_S
                    break
            self.addresses[index] = addresses
            self.use([RouterAdmin(one.admin, self._identity) for one in self.addresses])
            self._reporter.event(f"{what} listens again: HTTP {addresses.http}, gRPC {addresses.grpc}")

    async def _end(self, actor: Any) -> None:
        if actor is not None:
            with contextlib.suppress(TimeoutError, RayActorError, RayTaskError):
                await asyncio.wait_for(result(actor.stop.remote()), _STOP_S)
            await self._cluster.kill(actor)


def _of(what: str, error: ray.exceptions.RayError) -> ClusterError:
    """What Ray says of an actor's error, as ours."""
    raised = cause(error)
    if isinstance(raised, ClusterError):
        return type(raised)(f"{what}: {raised}")
    return RouterError(f"{what} died: {first_line(raised)}")
