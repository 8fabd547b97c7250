"""Ray, as far as prelay uses it: a place and a process for each worker. Requests never pass through it.

A private Ray is this machine. The nodes of one that is joined may be on many hosts: each worker is placed on
one of them as a whole, wherever there is room among those with the resources and labels that it asks for.

Ray's calls block, so they run in one thread of their own. That thread must live as long as this process:
Ray asks the kernel to kill its processes when the thread that started them ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import ray
import ray.exceptions
from ray.util import list_named_actors
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import RayError
from cluster.host_spec import HostSpec
from cluster.process_tree import end_of_child
from cluster.sections import parse_host_port

P = ParamSpec("P")
T = TypeVar("T")

_OBJECT_STORE_BYTES = 80 * 2**20  # nothing of size goes through it; Ray's minimum is a little less
_CONNECT_TIMEOUT_S = 5.0
_JOIN_TIMEOUT_S = 20.0
_START_TIMEOUT_S = 60.0
_PLACE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Place:
    """Of a worker. node_id: of the node that its group is on. first_slot: of that node's cores; None where
    the workers' own numbering holds, which is on a private Ray."""

    group: PlacementGroup
    node_id: str
    first_slot: int | None


@dataclass(frozen=True, slots=True)
class Left:
    """What there is already of a worker of a detached deployment. actor: of its latest life; None if that is
    over."""

    group: PlacementGroup
    node_id: str
    actor: Any


class RayCluster:
    """A private Ray on this machine, or a running one that was joined.

    address: HOST:PORT to join, None to start one. num_cpus: what all workers need together. directory: for
    Ray's files.
    """

    def __init__(
        self,
        address: str | None,
        num_cpus: int,
        directory: Path,
        wait_s: float = 0.0,
        detached: str | None = None,
    ) -> None:
        """wait_s: how long nodes of a cluster that is joined may take to come. detached: name of a deployment
        whose actors and places outlive this process."""
        self.is_local = address is None
        self._wait_s = wait_s
        self._address = address
        self._num_cpus = num_cpus
        self._directory = directory
        self._namespace = f"prelay-{detached or directory.name.removeprefix('prelay-')}"
        self._lifetime = None if detached is None else "detached"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._started = False
        # Of a joined cluster: whose the slots of each node's cores are.
        self._slots: defaultdict[str, dict[int, str]] = defaultdict(dict)

    async def start(self) -> None:
        """Raises RayError if Ray does not start, cannot be reached, or has too few CPUs; for workers that are
        there already (`left`) it has them."""
        for name in ("ray", "ray._private"):
            logging.getLogger(name).setLevel(logging.ERROR)
        if self._address is None:
            await self._init(
                "start Ray",
                _START_TIMEOUT_S,
                address="local",
                # More than there are cores, if so configured: the workers then share them. And all cores that
                # there are, as workers may be added later.
                num_cpus=max(self._num_cpus, len(os.sched_getaffinity(0))),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                _temp_dir=str(self._directory),
            )
            return
        if not ray.is_initialized():  # as it is in a process that Ray has started itself
            await self._check_address(self._address)
            what = f"join the Ray cluster at {self._address}"
            await self._init(what, _JOIN_TIMEOUT_S, address=self._address)
        if not await self.left():
            await self._wait_for_nodes()

    def node_address(self) -> str:
        """Of the node that this process is on."""
        address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray leaves it untyped
        return address

    async def left(self) -> dict[str, Left]:
        """The workers of this detached deployment that somebody has started before, by their ids. A worker
        that is wanted has a place, whether it lives or not."""
        return {} if self._lifetime is None else await self._call(self._find_left)

    async def named(self, name: str) -> Any:
        """The actor of this detached deployment with that name; None if there is none."""
        with contextlib.suppress(ValueError):
            return await self._call(ray.get_actor, name, self._namespace)
        return None

    async def actors(self) -> list[Any]:
        """All actors of this detached deployment."""
        found = []
        actors: Any = await self._call(list_named_actors, all_namespaces=True)
        for actor in actors:
            if actor["namespace"] == self._namespace and (one := await self.named(actor["name"])) is not None:
                found.append(one)
        return found

    async def detached(self) -> list[str]:
        """The names of all detached deployments that have an actor."""
        actors: Any = await self._call(list_named_actors, all_namespaces=True)
        spaces = {actor["namespace"] for actor in actors}
        return sorted(space.removeprefix("prelay-") for space in spaces if space.startswith("prelay-"))

    async def spawn_alone(
        self,
        actor_class: type,
        name: str,
        *args: object,
        resources: Mapping[str, float] | None = None,
        labels: Mapping[str, str] | None = None,
        max_restarts: int = 0,
    ) -> Any:
        """Start an actor that takes no CPUs, on a node with these resources and labels. max_restarts: so
        often Ray starts it again, with the same arguments; -1 is always. Raises RayError if there is one of
        that name."""
        remote_class: Any = ray.remote(actor_class)
        options = remote_class.options(
            name=name,
            num_cpus=0,
            resources=dict(resources or {}),
            label_selector=dict(labels) if labels else None,
            lifetime=self._lifetime,
            max_restarts=max_restarts,
            scheduling_strategy="SPREAD",
        )
        try:
            return await self._call(options.remote, *args)
        except ValueError as error:
            raise RayError(f"there is an actor {name} in {self._namespace} already") from error

    async def place(self, spec: HostSpec) -> Place:
        """Reserve CPUs for one worker. Raises RayError if they do not become free in time."""
        bundle = {"CPU": float(spec.num_cpus), **spec.resources}
        group: PlacementGroup = await self._call(
            placement_group,
            [bundle],
            strategy="STRICT_PACK",
            name=f"{self._namespace} {spec.worker_id}",
            lifetime=self._lifetime,
            bundle_label_selector=[dict(spec.labels)] if spec.labels else None,
        )
        try:
            await self._wait_for_room(group, spec, bundle)
            return await self.where(group, spec)
        except BaseException:
            await self.give_back(group, spec.worker_id)  # else it would take them later, for nobody
            raise

    async def has_room(self, spec: HostSpec) -> bool:
        """Whether as much as that worker needs is free, all nodes together."""
        free = await self._call(ray.available_resources)
        wanted = {"CPU": float(spec.num_cpus), **spec.resources}
        return all(free.get(name, 0.0) >= value for name, value in wanted.items())

    async def _wait_for_room(
        self, group: PlacementGroup, spec: HostSpec, bundle: Mapping[str, float]
    ) -> None:
        timeout_s = max(_PLACE_TIMEOUT_S, self._wait_s)
        deadline = time.monotonic() + timeout_s
        while not await self._call(group.wait, 1):
            if time.monotonic() >= deadline:
                wanted = ", ".join(f"{name} {value:g}" for name, value in bundle.items())
                wanted += "".join(f", {name}={value}" for name, value in spec.labels.items())
                raise RayError(
                    f"no room for worker {spec.worker_id}: Ray found no node with free {wanted} "
                    f"in {timeout_s:.0f} s"
                )

    async def where(self, group: PlacementGroup, spec: HostSpec) -> Place:
        """Where a worker's group is now: Ray moves it when its node dies."""
        if self.is_local:
            return Place(group, "", None)
        while not await self._call(group.wait, 1):
            pass  # its node has died, and there is no other yet
        table = await self._call(placement_group_table, group)
        node_id = str(table["bundles_to_node_id"].get(0, ""))
        self._free_slots(spec.worker_id)
        taken = self._slots[node_id]
        wanted = range(spec.num_cpus)
        first = next(
            i for i in range(len(taken) * spec.num_cpus + 1) if not any(i + n in taken for n in wanted)
        )
        return self.held(group, node_id, replace(spec, first_slot=first))

    def held(self, group: PlacementGroup, node_id: str, spec: HostSpec) -> Place:
        """The place of a worker on a joined cluster that has the slots of its spec."""
        taken = self._slots[node_id]
        taken.update({spec.first_slot + n: spec.worker_id for n in range(spec.num_cpus)})
        return Place(group, node_id, spec.first_slot)

    async def spawn(
        self, actor_class: type, group: PlacementGroup, name: str, num_cpus: int, *args: object
    ) -> Any:
        """Start an actor's process in a place; returns its handle at once."""
        # mypy: ray types `remote` by overloads that do not know a class held in a variable.
        remote_class: Any = ray.remote(actor_class)
        options = remote_class.options(
            name=name,
            num_cpus=num_cpus,
            lifetime=self._lifetime,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        )
        return await self._call(options.remote, *args)

    def _free_slots(self, worker_id: str) -> None:
        for slots in self._slots.values():
            for slot in [slot for slot, owner in slots.items() if owner == worker_id]:
                del slots[slot]

    async def give_back(self, group: PlacementGroup, worker_id: str) -> None:
        """The CPUs of a worker that will not come back."""
        self._free_slots(worker_id)
        await self._call(remove_placement_group, group)

    async def kill(self, actor: Any) -> None:
        """End an actor's process, if it has not ended."""
        await self._call(ray.kill, actor, no_restart=True)

    async def end(self, actor: Any, pid: int) -> None:
        """End an actor's process although it does not answer; where it is ours, without asking it."""
        if self.is_local:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        else:
            await self.kill(actor)

    def log_of(self, pid: int) -> Path | None:
        """Where an actor's process has written what went wrong; None if that is on another machine."""
        return next(self._directory.glob(f"session_*/logs/worker-*-{pid}.err"), None)

    async def ended(self) -> RayError:
        """Wait until one of the two processes that a private Ray cannot do without has ended.

        Returns what to say about it. A joined cluster is not watched: its workers' ends tell enough.
        """
        if not self.is_local:
            await asyncio.Event().wait()
        # Ray itself would tell nobody: the raylet takes the workers with it, and without the head
        # (gcs_server) Ray ends this process after a minute, in the middle of whatever it does.
        ends = [asyncio.create_task(end_of_child(name)) for name in ("raylet", "gcs_server")]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        return RayError(f"Ray's process {done.pop().result()} has ended: the deployment cannot go on")

    async def stop(self) -> None:
        """Leave a joined cluster: its actors of ours and their placement groups end.

        A private Ray is not taken down politely: its processes descend from this one and are killed with it.
        """
        if self._started and not self.is_local:
            await self._call(ray.shutdown)

    def _find_left(self) -> dict[str, Left]:
        found = {}
        lives: dict[str, tuple[int, str]] = {}
        for actor in list_named_actors(all_namespaces=True):
            worker_id, _, epoch = str(actor["name"]).rpartition("-")
            if actor["namespace"] == self._namespace and epoch.isdigit():
                lives[worker_id] = max(lives.get(worker_id, (0, "")), (int(epoch), actor["name"]))
        for entry in placement_group_table().values():
            space, _, worker_id = entry["name"].partition(" ")
            if space != self._namespace or entry["state"] == "REMOVED":
                continue
            actor = None
            with contextlib.suppress(ValueError):  # it has just ended
                actor = ray.get_actor(lives[worker_id][1], self._namespace) if worker_id in lives else None
            node_id = str(entry["bundles_to_node_id"].get(0, ""))
            found[worker_id] = Left(get_placement_group(entry["name"]), node_id, actor)
        return dict(sorted(found.items()))

    async def _init(self, what: str, timeout_s: float, **options: Any) -> None:
        common: dict[str, Any] = {
            "namespace": self._namespace,
            "log_to_driver": False,
            "configure_logging": False,
        }
        try:
            await asyncio.wait_for(self._call(ray.init, **common, **options), timeout_s)
        except TimeoutError:
            hint = (
                ""
                if self.is_local
                else "; if it wants a token, as Ray does by default, set RAY_AUTH_MODE=token"
            )
            raise RayError(f"could not {what} within {timeout_s:.0f} s{hint}") from None
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise RayError(f"could not {what}: {error}") from error
        self._started = True

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, functools.partial(function, *args, **kwargs))

    async def _check_address(self, address: str) -> None:
        # ray.init itself would try for a minute and then complain about something else.
        host, port = parse_host_port(address)
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, writer = await asyncio.open_connection(host, port)
        except (OSError, TimeoutError) as error:
            reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
            raise RayError(
                f"there is no Ray cluster at {address} ({reason}): check ray.address (--ray-address), "
                "start one with `ray start --head`, or leave it out to start a private one"
            ) from error
        writer.close()

    async def _wait_for_nodes(self) -> None:
        deadline = time.monotonic() + self._wait_s
        while True:
            try:
                return await self._call(self._check_room)
            except RayError:
                if time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(1.0)

    def _check_room(self) -> None:
        there = math.fsum(
            float(node["Resources"].get("CPU", 0.0))
            for node in ray.nodes()  # type: ignore[no-untyped-call]  # Ray leaves it untyped
            if node["Alive"]
        )
        if there < self._num_cpus:
            raise RayError(
                f"the workers need {self._num_cpus} CPUs, but the nodes of the Ray cluster at "
                f"{self._address} have {there:g} together: lower replicas or threads of "
                "the pools, add a node, or wait for those that are to come (ray.wait_s)"
            )
