"""Changes the workers of a running deployment: their roles, and how many there are. Each change says what it
has done, a line at a time, and leaves what it has done if it cannot go on.

A worker is drained before it leaves its role: nothing new goes there, and what it has ends, or goes on at
other workers when the time for that is over. Nothing is changed by which requests could not be served.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Protocol

import pydantic
from prelay.v1 import worker_pb2

from cluster.config import ServeConfig
from cluster.errors import ClusterError, ConfigError, UnknownWorkerError, WorkerError
from cluster.host_spec import HostSpec
from cluster.pool_changes import (
    Become,
    Renew,
    Start,
    Step,
    Stop,
    is_live,
    renewals,
    said,
    serves_without,
    steps_to,
)
from cluster.roles import ROLE_NAMES
from cluster.router_admin import Routers
from cluster.worker_life import LiveWorker, WorkerLife
from cluster.worker_specs import another_worker, in_role, unmeasured

_LOOK_S = 0.05


class Workers(Protocol):
    """What of a deployment can be changed."""

    @property
    def lives(self) -> Sequence[WorkerLife]: ...

    async def add(self, spec: HostSpec) -> LiveWorker: ...

    async def remove(self, life: WorkerLife) -> None: ...

    async def has_room(self, spec: HostSpec) -> bool: ...


class Reshape:
    """config: resolved and checked, as the deployment was started with it."""

    def __init__(self, config: ServeConfig, workers: Workers, router: Routers) -> None:
        self._config = config
        self._workers = workers
        self._router = router
        self.changing = asyncio.Lock()
        """Held by whoever changes something."""
        self.standing_in: frozenset[str] = frozenset()
        """Workers that have another role for the time being (cover.py)."""
        self.left_mixed: dict[str, worker_pb2.Role] = {}
        """Workers that stood in when an upgrade was broken off, and their own roles: for `Cover` to bring
        back."""
        # The epoch of those that are kept empty.
        self._drained: dict[str, int] = {}

    @property
    def is_settled(self) -> bool:
        """Whether all workers are up, in their own roles, and get requests."""
        return not self.standing_in and len(self._serving()) == len(self._workers.lives)

    async def take_over_drains(self) -> list[str]:
        """Whom routers give nothing new stays empty, though whoever asked for it is gone. Returns their
        names. Raises WorkerError."""
        found = [worker.info for worker in (await self._router.status()).workers if worker.draining]
        for info in found:
            await self._router.drain(info.worker_id, info.epoch, draining=True)  # those that come back, too
            self._drained[info.worker_id] = info.epoch
        return [info.worker_id for info in found]

    async def has_room(self, role: worker_pb2.Role) -> bool:
        """Whether another worker of that role would find its devices free."""
        templates = [life.template for life in self._workers.lives]
        return await self._workers.has_room(another_worker(self._config, role, templates))

    async def set_role(
        self, worker_id: str, role: worker_pb2.Role, drain_s: float
    ) -> AsyncGenerator[str, None]:
        """Raises ClusterError."""
        life, name = self._life(worker_id), ROLE_NAMES[role]
        if life.role == role:
            yield f"{worker_id} is a {name} worker already"
            return
        after = self._roles() | {worker_id: role}
        self._check_sizes(
            {other: sum(its == other for its in after.values()) for other in ROLE_NAMES},
            f"{worker_id} cannot become a {name} worker",
        )
        if not is_live(life.role, role) and not serves_without(self._serving(), worker_id):
            raise ConfigError(
                f"while {worker_id} changes its role nobody could {_does(life.role)}: make another worker "
                "mixed first"
            )
        async with aclosing(self.become(life, role, drain_s)) as lines:
            async for line in lines:
                yield line

    async def drain(self, worker_id: str, drain_s: float, *, undo: bool = False) -> AsyncGenerator[str, None]:
        """The worker stays empty until that is undone, or its life ends. Raises ClusterError."""
        life = self._life(worker_id)
        if life.live is None:
            raise WorkerError(f"worker {worker_id} is down: there is nothing to drain")
        if undo:
            self._drained.pop(worker_id, None)
            await self._router.drain(worker_id, life.live.info.epoch, draining=False)
            yield f"{worker_id} gets new requests again"
            return
        if not serves_without(self._serving(), worker_id):
            raise ConfigError(
                f"without {worker_id} nobody could {_does(life.role)}: make another worker mixed first, or "
                "start one"
            )
        async with aclosing(self._empty(life, drain_s, keeps=True)) as lines:
            async for line in lines:
                yield line
        self._drained[worker_id] = life.live.info.epoch

    async def set_pools(
        self, wanted: Mapping[worker_pb2.Role, int], drain_s: float, *, dry_run: bool = False
    ) -> AsyncGenerator[str, None]:
        """wanted: workers of each role; what is not named stays. Raises ClusterError."""
        self._check_nobody_stands_in()
        roles = self._roles()
        have = {role: sum(its == role for its in roles.values()) for role in ROLE_NAMES}
        self._check_sizes(have | dict(wanted), "these pools cannot serve")
        steps = steps_to(roles, wanted)
        if not steps:
            yield "nothing to change"
        async with aclosing(self._do_all(steps, drain_s, dry_run=dry_run)) as lines:
            async for line in lines:
                yield line

    async def renew(
        self, worker_ids: Sequence[str], drain_s: float, *, dry_run: bool = False
    ) -> AsyncGenerator[str, None]:
        """worker_ids: in this order; none means all. A new process that does not start ends it, with all
        others as they were. Raises ClusterError."""
        self._check_nobody_stands_in()
        for worker_id in worker_ids:
            self._life(worker_id)
        down = [life.worker_id for life in self._workers.lives if life.live is None]
        if down:
            raise ConfigError(f"{', '.join(down)} is down: try again when all workers serve")
        roles = self._roles()
        steps = renewals(roles, worker_ids or list(roles))
        try:
            async with aclosing(self._do_all(steps, drain_s, dry_run=dry_run)) as lines:
                async for line in lines:
                    yield line
        finally:
            now = self._roles()
            self.left_mixed |= {one: role for one, role in roles.items() if now.get(one, role) != role}

    async def _do_all(
        self, steps: Sequence[Step], drain_s: float, *, dry_run: bool
    ) -> AsyncGenerator[str, None]:
        for number, step in enumerate(steps, start=1):
            yield f"{number} of {len(steps)}: {said(step, ROLE_NAMES)}"
            if not dry_run:
                async with aclosing(self._do(step, drain_s)) as lines:
                    async for line in lines:
                        yield line

    async def _do(self, step: Step, drain_s: float) -> AsyncGenerator[str, None]:
        match step:
            case Start(role):
                spec = another_worker(self._config, role, [life.template for life in self._workers.lives])
                live = await self._workers.add(spec)
                yield f"{spec.worker_id} serves (epoch {live.info.epoch}, pid {live.info.pid})"
            case Become(worker_id, role):
                life = self._life(worker_id)
                if not is_live(life.role, role):
                    self._check_others(life)
                async with aclosing(self.become(life, role, drain_s)) as lines:
                    async for line in lines:
                        yield line
            case Stop(worker_id):
                life = self._life(worker_id)
                self._check_others(life)
                async with aclosing(self._empty(life, drain_s, keeps=False)) as lines:
                    async for line in lines:
                        yield line
                await asyncio.shield(self._workers.remove(life))
                yield f"{worker_id} has ended"
            case Renew(worker_id):
                life = self._life(worker_id)
                self._check_others(life)
                async with aclosing(self._empty(life, drain_s, keeps=False)) as lines:
                    async for line in lines:
                        yield line
                began = time.monotonic()
                template = unmeasured(self._config, life.template)
                live = await asyncio.shield(asyncio.ensure_future(life.renew(template)))
                yield (
                    f"{worker_id} serves with version {live.info.version} (epoch {live.info.epoch}, pid "
                    f"{live.info.pid}): away for {time.monotonic() - began:.1f} s"
                )

    async def become(
        self, life: WorkerLife, role: worker_pb2.Role, drain_s: float
    ) -> AsyncGenerator[str, None]:
        """Whatever becomes of those that it serves. Raises ClusterError."""
        if life.live is None:
            raise WorkerError(f"worker {life.worker_id} is down: try again when it serves")
        began = time.monotonic()
        template = in_role(self._config, life.template, role)
        if is_live(life.role, role):
            await life.read_prompts(template)
            yield f"{life.worker_id} is a {ROLE_NAMES[role]} worker now, in the same life"
            return
        async with aclosing(self._empty(life, drain_s, keeps=False)) as lines:
            async for line in lines:
                yield line
        drained = time.monotonic()
        # Whoever asked may hang up: what has begun is brought to its end.
        live = await asyncio.shield(asyncio.ensure_future(life.become(template)))
        yield (
            f"{life.worker_id} is a {ROLE_NAMES[role]} worker now (epoch {live.info.epoch}): drained for "
            f"{drained - began:.1f} s, away for {time.monotonic() - drained:.1f} s"
        )

    async def _empty(self, life: WorkerLife, drain_s: float, *, keeps: bool) -> AsyncGenerator[str, None]:
        """Until it has nothing any more, or for drain_s. keeps: it is not to get anything new after that
        either, until somebody says so."""
        live = life.live
        if live is None:
            return  # it is being started again: it has nothing
        worker_id, epoch = life.worker_id, live.info.epoch
        deadline = time.monotonic() + drain_s
        is_done = False
        try:
            left = told = await self._router.drain(worker_id, epoch, draining=True)
            yield f"{worker_id} gets nothing new; it has {left} requests"
            while left and time.monotonic() < deadline:
                await asyncio.sleep(_LOOK_S)
                left = await self._router.drain(worker_id, epoch, draining=True)
                if left < told // 2:
                    told = left
                    yield f"{worker_id} has {left} requests"
            if left:
                yield f"{worker_id} still has {left} requests after {drain_s:g} s" + (
                    "" if keeps else ", which go on at other workers"
                )
            else:
                yield f"{worker_id} is empty"
            is_done = True
        finally:
            if not is_done:
                with contextlib.suppress(ClusterError):
                    await self._router.drain(worker_id, epoch, draining=False)

    def _serving(self) -> dict[str, worker_pb2.Role]:
        """Those that are up and get new requests."""
        return {
            life.worker_id: life.role
            for life in self._workers.lives
            if life.live is not None and self._drained.get(life.worker_id) != life.live.info.epoch
        }

    def _check_nobody_stands_in(self) -> None:
        """Raises ConfigError."""
        if self.standing_in:
            who = ", ".join(sorted(self.standing_in))
            raise ConfigError(
                f"{who} stand in for a role whose workers are gone: try again when they are back, or change "
                "single workers (prelay role)"
            )

    def _check_others(self, life: WorkerLife) -> None:
        """Raises ConfigError if nobody would serve while that one is drained."""
        if not serves_without(self._serving(), life.worker_id):
            raise ConfigError(
                f"without {life.worker_id} nobody could {_does(life.role)} now: try again later"
            )

    def _roles(self) -> dict[str, worker_pb2.Role]:
        return {life.worker_id: life.role for life in self._workers.lives}

    def _life(self, worker_id: str) -> WorkerLife:
        for life in self._workers.lives:
            if life.worker_id == worker_id:
                return life
        there = ", ".join(life.worker_id for life in self._workers.lives)
        raise UnknownWorkerError(f"there is no worker {worker_id!r}: there are {there}")

    def _check_sizes(self, counts: Mapping[worker_pb2.Role, int], what: str) -> None:
        """By the rules of the configuration. Raises ConfigError."""
        raw = self._config.model_dump()
        for role, count in counts.items():
            raw[ROLE_NAMES[role]]["replicas"] = count
        try:
            ServeConfig.model_validate(raw)
        except pydantic.ValidationError as error:
            why = "; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())
            raise ConfigError(f"{what}: {why}") from error


def _does(role: worker_pb2.Role) -> str:
    if role == worker_pb2.ROLE_MIXED:
        return "serve"
    return "read prompts" if role == worker_pb2.ROLE_PREFILL else "write answers"
