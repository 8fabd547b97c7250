"""A deployment that lives in a Ray cluster without whoever started it.

Its controller is a detached actor, its workers and their places are detached, and its routers are actors,
too, or run elsewhere (`prelay router`). If the controller's process or node dies, Ray starts it again,
anywhere: it finds workers and routers by their names, asks each what it serves, and takes them over as they
are. Until then they serve on; only what the controller does (start them again, change them) waits for it.

    prelay serve --detach NAME --> Controller (actor) --> WorkerHost (actors)
                                        ^ killed: started again by Ray, and takes over
    prelay stop NAME ----------------> stop
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from cluster.actor_calls import first_line, result
from cluster.errors import ChangeError, ClusterError, ConfigError
from cluster.launch import Deployment, Ready
from cluster.orders import Order
from cluster.ray_cluster import RayCluster
from cluster.reporter import KeptReporter, Reporter

_CONTROLLER = "controller"
_AGAIN_S = 5.0
"""After which a controller that cannot go on is started again."""
_LOOK_S = 0.2
_STOP_S = 20.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Look:
    """How far a controller has come. lines: since the last look. error: why it has given up."""

    stages: dict[str, tuple[str, float | None]]
    lines: list[str]
    ready: Ready | None
    error: ClusterError | None


class Controller:
    """The actor. It runs the deployment in a thread of its own, from the moment that it is made: Ray makes it
    again without asking anybody."""

    def __init__(self, order: bytes) -> None:
        """order: an Order's JSON."""
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        # The first controller says what is wrong to whoever started it; those after it have nobody to tell.
        self._is_first = not ray.get_runtime_context().was_current_actor_reconstructed
        self._order = Order.from_json(order)
        self._reporter = KeptReporter(_log)
        self._ready: Ready | None = None
        self._error: ClusterError | None = None
        self._loop = asyncio.new_event_loop()
        self._told_to_stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=[self._run()], daemon=True)
        self._thread.start()

    async def look(self, seen: int) -> Look:
        """seen: lines that the last looks had."""
        reporter = self._reporter
        return Look(dict(reporter.stages), reporter.lines[seen:], self._ready, self._error)

    async def stop(self) -> None:
        """Returns when the workers have ended."""
        self._loop.call_soon_threadsafe(self._told_to_stop.set)
        await asyncio.to_thread(self._thread.join)

    async def _run(self) -> None:
        with tempfile.TemporaryDirectory(prefix="prelay-") as directory:
            deployment = Deployment(self._order.config, Path(directory), self._reporter, self._reporter.event)
            serving = asyncio.create_task(self._serve(deployment))
            stopping = asyncio.create_task(self._told_to_stop.wait())
            await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not stopping.done():
                if not self._is_first or self._ready is not None:
                    # As it is no child of ours, what still serves goes on: the next one takes it over.
                    _log.critical("event=controller_gives_up", exc_info=serving.exception())
                    await asyncio.sleep(_AGAIN_S)
                    os._exit(1)
                self._error = _as_cluster_error(serving.exception())
                await stopping
            serving.cancel()
            await asyncio.wait([serving])
            await deployment.stop()

    async def _serve(self, deployment: Deployment) -> None:
        self._ready = await deployment.start()
        self._reporter.close()
        await deployment.run()


def _as_cluster_error(error: BaseException | None) -> ClusterError:
    if isinstance(error, ClusterError):
        return error
    return ClusterError(f"unexpected {type(error).__name__}: {error}; the log of the controller has more")


async def start_detached(order: Order, run_directory: Path, reporter: Reporter) -> Ready:
    """Start one, and wait until it serves. Raises ClusterError; then, or when it is cancelled, nothing is
    left of it, but for workers that there were before."""
    name, address = order.config.ray.detached, order.config.ray.address
    assert name is not None
    cluster = RayCluster(address, 0, run_directory, detached=name)
    await cluster.start()
    try:
        if await cluster.named(_CONTROLLER) is not None:
            raise ChangeError(
                f"deployment {name} runs in the Ray cluster at {address} already: change it (`prelay scale`, "
                f"`prelay role`), or end it (`prelay stop {name} --ray-address {address}`) before"
            )
        had = await cluster.left()
        controller = await cluster.spawn_alone(Controller, _CONTROLLER, order.to_json(), max_restarts=-1)
        try:
            return await _ready(controller, reporter)
        except BaseException:
            if had:
                # Somebody else's workers serve on.
                await cluster.kill(controller)
            else:
                await asyncio.shield(_end(cluster, controller))
            raise
    finally:
        await cluster.stop()


async def _ready(controller: Any, reporter: Reporter) -> Ready:
    seen = 0
    while True:
        try:
            look: Look = await controller.look.remote(seen)
        except ray.exceptions.RayError as error:
            raise ClusterError(f"the controller has died: {first_line(error)}") from error
        seen += len(look.lines)
        for line in look.lines:
            reporter.event(line)
        for what, (stage, fraction) in look.stages.items():
            reporter.progress(what, stage, fraction)
        if look.error is not None:
            raise look.error
        if look.ready is not None:
            return look.ready
        await asyncio.sleep(_LOOK_S)


async def stop_detached(name: str, address: str) -> int:
    """End a deployment, whether its controller lives or not; returns how many workers it had. Raises
    RayError, or ConfigError if there is none of that name."""
    with tempfile.TemporaryDirectory(prefix="prelay-") as directory:
        cluster = RayCluster(address, 0, Path(directory), detached=name)
        await cluster.start()
        try:
            controller = await cluster.named(_CONTROLLER)
            left = await cluster.left()
            if controller is None and not left:
                there = ", ".join(await cluster.detached())
                raise ConfigError(
                    f"there is no deployment {name} in the Ray cluster at {address}: there "
                    f"{'is ' + there if there else 'are none'}"
                )
            await _end(cluster, controller)
            return len(left)
        finally:
            await cluster.stop()


async def _end(cluster: RayCluster, controller: Any) -> None:
    if controller is not None:
        with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
            await asyncio.wait_for(result(controller.stop.remote()), _STOP_S)
        await cluster.kill(controller)
    for actor in await cluster.actors():  # routers, and what is left of workers
        await cluster.kill(actor)
    for worker_id, left in (await cluster.left()).items():
        await cluster.give_back(left.group, worker_id)
