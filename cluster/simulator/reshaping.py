"""Roles that change while a simulated cluster serves, as cluster/reshape.py changes those of a running one: a
worker is drained, is away for a moment, and comes back with another role; decode and mixed are exchanged in
the middle of a life.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.simulator.clock import Clock
from cluster.simulator.cluster_spec import WorkerSpec
from router.pool_view import Role
from router.workload_profile import Seen

_LOOK_S = 0.25
"""Until whoever drains a worker looks again."""

Change = tuple[str, Role]
"""A worker, and what it is to become."""


class Shaper(Protocol):
    """Who decides."""

    def look(self, now: float, roles: Mapping[str, Role], seen: Seen) -> Sequence[Change]:
        """What to change, one after the other. roles: of all workers. seen: what has come lately."""


@dataclass(frozen=True, slots=True)
class Reshaping:
    """shaper: is asked every tick_s, unless something is being changed. workers: what a worker is in each
    role, whatever its name. drain_s: after which a worker's requests go on elsewhere. away_s: of a worker
    that changes its role."""

    shaper: Shaper
    workers: Mapping[Role, WorkerSpec]
    tick_s: float = 10.0
    drain_s: float = 30.0
    away_s: float = 2.0


class Cluster(Protocol):
    """What of a simulation can be changed."""

    @property
    def roles(self) -> Mapping[str, Role]: ...

    @property
    def seen(self) -> Seen: ...

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes, and all that came has ended."""

    def change_role(self, spec: WorkerSpec) -> None:
        """Between decode and mixed, at once."""

    def drain(self, worker_id: str) -> int:
        """It gets nothing new. How many requests it has."""

    def leave(self, worker_id: str) -> None:
        """It is away, and what it has is placed again."""

    def come_back(self, spec: WorkerSpec) -> None:
        """A new life."""


class Reshaper:
    """Asks, and makes the changes."""

    def __init__(self, reshaping: Reshaping, cluster: Cluster, clock: Clock) -> None:
        self._how = reshaping
        self._cluster = cluster
        self._clock = clock

    def begin(self) -> None:
        """From now on."""
        self._after(self._how.tick_s, self._look)

    def _look(self) -> None:
        cluster = self._cluster
        if not cluster.is_over:
            self._make(list(self._how.shaper.look(self._clock.now, cluster.roles, cluster.seen)))

    def _make(self, changes: Sequence[Change]) -> None:
        """All of them; then it is looked again."""
        if not changes:
            self.begin()
            return
        (worker_id, role), *others = changes
        spec = replace(self._how.workers[role], worker_id=worker_id)
        present = self._cluster.roles[worker_id]
        if present is role:
            self._make(others)
            return
        if present.writes and role.writes:
            self._cluster.change_role(spec)
            self._make(others)
            return
        deadline = self._clock.now + self._how.drain_s

        def come_back() -> None:
            self._cluster.come_back(spec)
            self._make(others)

        def look_again() -> None:
            if self._cluster.drain(worker_id) and self._clock.now < deadline:
                self._after(_LOOK_S, look_again)
                return
            self._cluster.leave(worker_id)
            self._after(self._how.away_s, come_back)

        look_again()

    def _after(self, seconds: float, what: Callable[[], None]) -> None:
        self._clock.at(self._clock.now + seconds, what)
