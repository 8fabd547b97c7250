"""A deployment: the router, Ray, and the workers of all pools; started in that order, watched, and stopped.

The router comes first because it takes the public ports, and a port in use must be known at once; only
routers that are actors need Ray before. Stopping goes the same way: first the router, which ends its clients'
streams with a clear error, then the workers, then Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from cluster.config import ServeConfig
from cluster.control import ControlServer
from cluster.cover import Cover
from cluster.errors import ClusterError, WorkerError
from cluster.external_routers import ExternalRouters
from cluster.host_spec import HostSpec
from cluster.pool_changes import can_serve
from cluster.ray_cluster import Left, RayCluster
from cluster.reporter import Reporter
from cluster.reshape import Reshape
from cluster.role_controller import RoleController, size_decider
from cluster.router_actors import RouterActors
from cluster.router_admin import Routers
from cluster.router_config import router_settings
from cluster.router_process import RouterAddresses, RouterProcess
from cluster.worker_life import LiveWorker, RestartPolicy, WorkerLife, life_of
from cluster.worker_specs import named_worker, worker_specs
from engine.tls import Identity

T = TypeVar("T")

_ATTACH_BEAT_S = 1.0
"""How often the router is asked whether it has lost a worker."""


@dataclass(frozen=True, slots=True)
class Ready:
    """What listens where, once everything does. addresses, router_pid: of a router of our own; else None.
    router_actors: of those that are actors."""

    config: ServeConfig
    addresses: RouterAddresses | None
    router_pid: int | None
    router_actors: tuple[RouterAddresses, ...]
    workers: tuple[LiveWorker, ...]
    startup_s: float


class Deployment:
    """config: resolved, with max_model_len filled in. run_directory: for Ray's files. on_router_log: told
    what the router logs, from router_log_level on.
    """

    def __init__(
        self,
        config: ServeConfig,
        run_directory: Path,
        reporter: Reporter,
        on_router_log: Callable[[str], None],
        router_log_level: str = "WARNING",
    ) -> None:
        self._router_log_level = router_log_level
        self._secret = secrets.token_hex(32)
        # Made when it starts, as it reads files.
        self._identity: Identity | None = None
        self._config = config
        self._reporter = reporter
        self._on_router_log = on_router_log
        self._cluster = RayCluster(
            config.ray.address, config.num_cpus, run_directory, config.ray.wait_s, config.ray.detached
        )
        self._router: RouterProcess | ExternalRouters | None = None
        self._lives: list[WorkerLife] = []
        self._control: ControlServer | None = None
        self._reshape: Reshape | None = None
        self._cover: Cover | None = None
        # That keep workers alive, while the deployment runs; and whether one was added.
        self._keeping: dict[asyncio.Task[None], WorkerLife] = {}
        self._added = asyncio.Event()

    async def start(self) -> Ready:
        """Start everything. Raises a ClusterError that says what could not be started; `stop` even then."""
        begin = time.monotonic()
        self._reporter.progress("router", "starting", None)
        if self._config.tls.internal is not None:
            self._identity = Identity(self._config.tls.internal)
        if self._config.router.actors:
            await self._start_ray()
        router = self._router = await self._find_router()
        self._reporter.progress("router", "ready", 1.0)
        workers = await _unless_it_fails(_end_of(router), self._start_workers(router))
        self._reshape = reshape = Reshape(self._config, self, router)
        if self._config.ray.detached is not None:
            for worker_id in await reshape.take_over_drains():
                self._reporter.event(f"worker {worker_id} is drained, as it was")
        self._cover = Cover(self, reshape, self._reporter)
        self._control = await ControlServer.start(reshape, self._control_beside(), self._identity)
        await router.controlled_at(self._control.address)
        own = router if isinstance(router, RouterProcess) else None
        took_s = time.monotonic() - begin
        addresses, pid = (None, None) if own is None else (own.addresses, own.pid)
        actors = tuple(router.addresses) if isinstance(router, RouterActors) else ()
        return Ready(self._config, addresses, pid, actors, workers, took_s)

    def _control_beside(self) -> str:
        """HOST:PORT: where operators reach us is a matter of the host alone."""
        if self._config.ray.detached is None:
            return self._config.router.admin
        return f"{self._cluster.node_address()}:0"  # wherever Ray has put us

    async def _find_router(self) -> RouterProcess | ExternalRouters:
        if external := self._config.router.external:
            return await ExternalRouters.connect(external, self._identity)
        if self._config.router.actors:
            return await RouterActors.launch(
                self._cluster, self._config, self._reporter, self._identity, self._router_log_level
            )
        settings = router_settings(self._config, self._router_log_level)
        return await RouterProcess.start(settings.to_json(), self._on_router_log, self._identity)

    async def run(self) -> None:
        """Keep the workers alive. Ends by a ClusterError only: no router, or no workers left that can serve
        together."""
        assert self._router is not None
        assert self._reshape is not None
        assert self._cover is not None
        for life in self._lives:
            self._keep(life)
        try:
            watches = (
                _end_of(self._router),
                _end_of(self._cluster),
                self._keep_attached(self._router),
                self._cover.keep(),
                *([self._router.keep()] if isinstance(self._router, RouterActors) else []),
                *self._controllers(self._router, self._reshape),
            )
            await _unless_it_fails(_all(*watches), self._watch())
        finally:
            await _cancel(self._keeping)
            self._keeping.clear()

    async def run_while(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, with the deployment kept running until then. Raises like both."""
        return await _unless_it_fails(self.run(), work)

    async def stop(self) -> None:
        """Stop everything that was started, however far `start` came."""
        if self._control is not None:
            await self._control.stop()
        if self._router is not None:
            await self._router.stop()
        await asyncio.gather(*(life.stop() for life in self._lives))
        await self._cluster.stop()

    def _controllers(self, router: Routers, reshape: Reshape) -> Sequence[Coroutine[Any, Any, object]]:
        """None, or the one that changes roles."""
        section = self._config.controller
        if section.mode == "none":
            return ()
        controller = RoleController(
            router, reshape, self._reporter, acts=section.mode == "act", sizes=size_decider(self._config)
        )
        return (controller.keep(),)

    @property
    def lives(self) -> Sequence[WorkerLife]:
        """Of all workers that there are to be."""
        return self._lives

    async def add(self, spec: HostSpec) -> LiveWorker:
        """One more worker, while the deployment runs. Raises ClusterError if it does not start."""
        assert self._router is not None
        life = self._life(spec, self._router)
        try:
            live = await life.start()
        except BaseException:
            await life.end()
            raise
        self._lives.append(life)
        self._keep(life)
        return live

    async def has_room(self, spec: HostSpec) -> bool:
        """Whether one more would find its devices free."""
        return await self._cluster.has_room(spec)

    async def remove(self, life: WorkerLife) -> None:
        """A worker is no longer wanted."""
        self._lives.remove(life)
        task = next(task for task, kept in self._keeping.items() if kept is life)
        del self._keeping[task]
        await _cancel([task])
        await life.end()

    def _life(self, spec: HostSpec, router: Routers) -> WorkerLife:
        secured = replace(spec, secret=self._secret, tls=self._config.tls.internal)
        return WorkerLife(secured, self._cluster, router, self._reporter, RestartPolicy())

    def _keep(self, life: WorkerLife) -> None:
        self._keeping[asyncio.create_task(life.keep_alive())] = life
        self._added.set()

    async def _start_ray(self) -> None:
        where = self._config.ray.address
        self._reporter.progress("ray", f"joining {where}" if where else "starting", None)
        await self._cluster.start()
        self._reporter.progress("ray", "ready", 1.0)

    async def _start_workers(self, router: Routers) -> tuple[LiveWorker, ...]:
        if not self._config.router.actors:
            await self._start_ray()
        if left := await self._cluster.left():
            workers = await self._take_over(left, router)
        else:
            self._lives = [self._life(spec, router) for spec in worker_specs(self._config)]
            workers = await _all(*(life.start() for life in self._lives))
        if any(worker.report.cores_shared for worker in workers):
            self._reporter.event(
                f"warning: the workers have {self._config.num_cpus} threads together, more than there are "
                "cores: some share a core, and their timings will suffer"
            )
        return tuple(workers)

    async def _take_over(self, left: Mapping[str, Left], router: Routers) -> list[LiveWorker]:
        """Those that serve go on; the others begin another life."""
        self._reporter.event(f"taking over {', '.join(left)}")
        found = await _all(*(life_of(one.actor) for one in left.values()))
        self._secret = next((one.spec.secret for one in found if one is not None), self._secret)
        specs = [
            named_worker(self._config, worker_id) if one is None else one.spec
            for worker_id, one in zip(left, found, strict=True)
        ]
        self._lives = [self._life(spec, router) for spec in specs]
        each = zip(self._lives, left.values(), found, strict=True)
        return await _all(*(life.resume(of_it, one) for life, of_it, one in each))

    async def _keep_attached(self, router: Routers) -> None:
        """Attach workers again that the router has given up; runs for ever."""
        while True:
            await asyncio.sleep(_ATTACH_BEAT_S)
            with contextlib.suppress(WorkerError):  # a router that has ended is seen elsewhere
                attached = await router.attached()
                lost = [
                    life
                    for life in self._lives
                    if life.live is not None and (life.worker_id, life.live.info.epoch) not in attached
                ]
                await asyncio.gather(*(life.attach_again() for life in lost))

    async def _watch(self) -> None:
        """Wait until so many workers are lost for good that the others cannot serve."""
        while True:
            self._added.clear()
            added = asyncio.create_task(self._added.wait())
            try:
                await asyncio.wait([*self._keeping, added], return_when=asyncio.FIRST_COMPLETED)
            finally:
                added.cancel()
            for task in [task for task in self._keeping if task.done()]:
                life = self._keeping.pop(task)
                error = task.exception()
                if not isinstance(error, ClusterError):
                    task.result()
                self._lives.remove(life)
                if not can_serve(life.role for life in self._lives):
                    raise WorkerError(f"{error}; {_who_is_left(self._lives)}") from error
                self._reporter.event(f"{error}; going on without it")
                await life.end()


def _who_is_left(lives: Iterable[WorkerLife]) -> str:
    names = ", ".join(life.worker_id for life in lives)
    return f"{names} cannot serve without it" if names else "it was the last worker"


async def _end_of(part: RouterProcess | ExternalRouters | RayCluster) -> None:
    """Raises the error that says so when `part` has ended."""
    raise await part.ended()


async def _unless_it_fails(watch: Coroutine[Any, Any, object], work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, unless `watch`, which only ends by raising, ends first: then its error."""
    tasks = asyncio.create_task(work), asyncio.create_task(watch)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            tasks[1].result()
        return await tasks[0]
    finally:
        await _cancel(tasks)


async def _all(*work: Coroutine[Any, Any, T]) -> list[T]:
    """All results in order; when one fails, the others are cancelled and its error is raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
