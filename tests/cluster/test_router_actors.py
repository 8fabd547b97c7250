"""Routers as actors: real routers, in actors of a Ray that is made up."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, cast

import pytest
from ray.exceptions import RayTaskError

from cluster import router_actors
from cluster.config import ServeConfig
from cluster.demo.run import demo_config
from cluster.errors import AddressInUseError, RouterError
from cluster.router_actors import RouterActors, RouterHost, _reachable

if TYPE_CHECKING:
    from cluster.ray_cluster import RayCluster


class Method:
    """Of an actor, called as Ray's are."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def remote(self, *args: Any) -> asyncio.Task[Any]:
        return asyncio.create_task(self._call(*args))

    async def _call(self, *args: Any) -> Any:
        try:
            return await self._method(*args)
        except Exception as error:
            raise RayTaskError("method", "a remote traceback", error) from error


class Actor:
    """An actor."""

    def __init__(self, host: RouterHost) -> None:
        self.host = host

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self.host, name))


class MadeUpRay:
    """What of RayCluster routers need."""

    def __init__(self) -> None:
        self.actors: dict[str, Actor] = {}
        self.asked: list[tuple[str, Mapping[str, float], Mapping[str, str]]] = []
        self.host: Callable[[str], Any] = RouterHost

    async def named(self, name: str) -> Actor | None:
        return self.actors.get(name)

    async def spawn_alone(
        self, actor_class: type, name: str, settings: str, *, resources: Any, labels: Any
    ) -> Actor:
        assert name not in self.actors
        self.asked.append((name, resources, labels))
        self.actors[name] = actor = Actor(self.host(settings))
        return actor

    async def kill(self, actor: Actor) -> None:
        await actor.host.stop()
        for name in [name for name, one in self.actors.items() if one is actor]:
            del self.actors[name]


@pytest.fixture
async def ray() -> AsyncIterator[MadeUpRay]:
    made = MadeUpRay()
    yield made
    for actor in list(made.actors.values()):
        await made.kill(actor)


def config(**router: Any) -> ServeConfig:
    given = demo_config()
    return given.model_copy(update={"router": given.router.model_copy(update=router)})


class HostWithoutNode(RouterHost):
    """An actor that Ray finds no node for."""

    async def start(self) -> NoReturn:
        await asyncio.Event().wait()
        raise AssertionError


class Notes:
    """A reporter."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.said = asyncio.Event()

    def progress(self, what: str, stage: str, fraction: float | None) -> None:
        pass

    def event(self, line: str) -> None:
        self.lines.append(line)
        self.said.set()

    def close(self) -> None:
        pass


async def launch(ray: MadeUpRay, notes: Notes, **router: Any) -> RouterActors:
    given = config(**router)
    return await RouterActors.launch(cast("RayCluster", ray), given, notes, None, "WARNING")


def pid(ray: MadeUpRay, name: str) -> int:
    router = ray.actors[name].host._router
    assert router is not None
    return router.pid


async def test_each_listens_and_one_that_dies_is_started_again_and_told_of_workers(
    ray: MadeUpRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_actors, "_AGAIN_S", 0.01)
    notes = Notes()
    routers = await launch(ray, notes, actors=2, resources={"router": 1.0}, labels={"zone": "a"})
    assert ray.asked == [(f"router-{index}", {"router": 1.0}, {"zone": "a"}) for index in range(2)]
    first, second = routers.addresses
    assert len({first.http, first.admin, second.http, second.admin}) == 4
    assert {one.address for one in routers._routers} == {first.admin, second.admin}

    keeping = asyncio.create_task(routers.keep())
    os.kill(pid(ray, "router-1"), signal.SIGKILL)
    while not any("listens again" in line for line in notes.lines):
        await asyncio.wait_for(notes.said.wait(), 30)
        notes.said.clear()
    assert notes.lines[0].startswith("router-1: the router ended with exit code -9")
    assert routers.addresses[0] == first
    assert routers.addresses[1] != second
    assert notes.lines[-1] == (
        f"router-1 listens again: HTTP {routers.addresses[1].http}, gRPC {routers.addresses[1].grpc}"
    )
    assert {one.address for one in routers._routers} == {one.admin for one in routers.addresses}
    assert await routers.attached() == set(), "both answer"
    keeping.cancel()
    await routers.stop()
    assert not ray.actors


async def test_those_of_a_deployment_that_lost_its_controller_are_taken_over(ray: MadeUpRay) -> None:
    before = await launch(ray, Notes(), actors=2)
    # One listens on, the other one's actor is there, but its router does not listen yet: it starts anew.
    serving, half = pid(ray, "router-0"), ray.actors["router-1"]
    await half.host.stop()
    half.host._router = None
    after = await launch(ray, Notes(), actors=2)
    assert after.addresses[0] == before.addresses[0]
    assert pid(ray, "router-0") == serving
    assert ray.actors["router-1"] is not half


async def test_one_that_cannot_listen_or_finds_no_room_says_so_and_leaves_nothing(
    ray: MadeUpRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressInUseError, match=f"router-0: cannot listen on 127.0.0.1:{port}"):
            await launch(ray, Notes(), actors=1, http=f"127.0.0.1:{port}")
    assert not ray.actors

    monkeypatch.setattr(router_actors, "_START_S", 0.0)
    ray.host = HostWithoutNode
    with pytest.raises(RouterError, match="no node of the Ray cluster has router 1, zone=a for it"):
        await launch(ray, Notes(), actors=1, resources={"router": 1.0}, labels={"zone": "a"})
    assert not ray.actors


@pytest.mark.parametrize(
    ("asked", "loopback", "given"),
    [
        ("0.0.0.0:80", False, "10.0.0.7:80"),
        ("[::]:80", False, "10.0.0.7:80"),
        ("127.0.0.1:80", False, "127.0.0.1:80"),
        ("127.0.0.1:80", True, "10.0.0.7:80"),
        ("10.0.0.9:80", True, "10.0.0.9:80"),
    ],
)
def test_others_reach_it_by_the_address_of_its_node(asked: str, loopback: bool, given: str) -> None:
    assert _reachable(asked, "10.0.0.7", loopback=loopback) == given
    assert _reachable(asked, "fd00::7", loopback=loopback) == given.replace("10.0.0.7", "[fd00::7]")
