"""When all workers of a role are gone, the rest serve mixed until one is back.

A decode worker reads prompts from one moment to the next, so that costs nothing; a prefill worker that is to
write begins another life, so it does that only when the role has been gone for a moment. Who stands in goes
back to its own role as soon as the others can do without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prelay.v1 import worker_pb2

from cluster.errors import ClusterError
from cluster.pool_changes import Become, can_serve, in_order, is_live
from cluster.reporter import Reporter
from cluster.reshape import Reshape
from cluster.roles import ROLE_NAMES
from cluster.worker_life import WorkerLife

_BEAT_S = 0.2
PATIENCE_S = 1.0
"""For which a role is gone before a worker begins another life for it."""
_DRAIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Member:
    """A worker that is up. role: that it has now; own: that it is there for."""

    role: worker_pb2.Role
    own: worker_pb2.Role


def stand_in(members: Mapping[str, Member], gone_s: float) -> list[Become]:
    """What to change now, in this order. members: the workers that are up. gone_s: how long those that are up
    have not been able to serve in their own roles; 0 if they can. A core."""
    now = {worker_id: member.role for worker_id, member in members.items()}
    own = {worker_id: member.own for worker_id, member in members.items()}
    if can_serve(own.values()):
        back = {worker_id: role for worker_id, role in own.items() if now[worker_id] != role}
        return in_order(now, back)
    mixed = worker_pb2.ROLE_MIXED
    if can_serve(now.values()):
        return []
    live = [Become(worker_id, mixed) for worker_id, role in now.items() if is_live(role, mixed)]
    if live or gone_s < PATIENCE_S:
        return live
    return [Become(worker_id, mixed) for worker_id in now]


class Lives(Protocol):
    """Of a deployment."""

    @property
    def lives(self) -> Sequence[WorkerLife]: ...


class Cover:
    """Watches over the workers of a deployment."""

    def __init__(self, workers: Lives, reshape: Reshape, reporter: Reporter) -> None:
        self._workers = workers
        self._reshape = reshape
        self._reporter = reporter
        # The own roles of those that stand in.
        self._own: dict[str, worker_pb2.Role] = {}
        self._gone_since: float | None = None

    async def keep(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(_BEAT_S)
            if not self._reshape.changing.locked():
                async with self._reshape.changing:
                    await self.look(time.monotonic())

    async def look(self, now: float) -> None:
        """Once."""
        up = {life.worker_id: life for life in self._workers.lives if life.live is not None}
        self._own |= self._reshape.left_mixed
        self._reshape.left_mixed = {}
        # Whom an operator has given another role meanwhile stands in no longer.
        self._own = {
            worker_id: own
            for worker_id, own in self._own.items()
            if any(
                one.worker_id == worker_id and one.role == worker_pb2.ROLE_MIXED
                for one in self._workers.lives
            )
        }
        self._reshape.standing_in = frozenset(self._own)
        members = {
            worker_id: Member(life.role, self._own.get(worker_id, life.role))
            for worker_id, life in up.items()
        }
        if not members or can_serve(member.own for member in members.values()):
            self._gone_since = None
        elif self._gone_since is None:
            self._gone_since = now
        gone_s = 0.0 if self._gone_since is None else now - self._gone_since
        for step in stand_in(members, gone_s):
            await self._make(up[step.worker_id], step.role)

    async def _make(self, life: WorkerLife, role: worker_pb2.Role) -> None:
        own = self._own.get(life.worker_id, life.role)
        why = "stands in" if role != own else "goes back to its own role"
        self._reporter.event(f"worker {life.worker_id} {why}: it is {ROLE_NAMES[role]} from now on")
        self._own[life.worker_id] = own
        drain_s = _DRAIN_S if role == own else 0.0
        # If it died meanwhile, or is started anew in that role, the next look sees it.
        with contextlib.suppress(ClusterError):
            async with contextlib.aclosing(self._reshape.become(life, role, drain_s)) as lines:
                async for _ in lines:
                    pass
        if life.role == own:
            self._own.pop(life.worker_id, None)
        self._reshape.standing_in = frozenset(self._own)
