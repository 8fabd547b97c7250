"""Which workers a decision looks at: all of a small pool, some of a large one.

So a decision costs the same with a thousand workers as with some dozens, and several routers that see the
same figures do not all send their next request to the same worker. That some drawn at random are nearly as
good as all is the power of choices; with the best of the last times among them it holds for unequal workers
(Mitzenmacher, Prabhakar and Shah, "Load Balancing with Memory", FOCS 2002).
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence

from router.pool_view import PoolView, Role, WorkerView
from router.prefix_index import PrefixIndex
from router.requests import Request

MOST_CANDIDATES = 32
_REMEMBERED = 4


class Candidates:
    """Of the workers of some roles that new requests go to."""

    def __init__(
        self, pool: PoolView, prefixes: PrefixIndex, rng: random.Random, roles: tuple[Role, ...]
    ) -> None:
        self._pool = pool
        self._prefixes = prefixes
        self._rng = rng
        self._roles = roles
        self._remembered: OrderedDict[str, None] = OrderedDict()

    def look(self, request: Request) -> Sequence[WorkerView]:
        """Those that hold a part of the prompt's KV are among them."""
        workers = self._pool.placeable(*self._roles)
        if len(workers) <= MOST_CANDIDATES:
            return workers
        chosen = {one.worker_id: one for one in self._rng.sample(workers, MOST_CANDIDATES)}
        for worker_id in (*self._prefixes.holders(request), *self._remembered):
            worker = self._pool.get(worker_id)
            if worker is not None and worker.role in self._roles and worker.up and not worker.suspected:
                chosen[worker_id] = worker
        return tuple(chosen.values())

    def remember(self, worker_id: str) -> None:
        """It was among the best."""
        self._remembered[worker_id] = None
        self._remembered.move_to_end(worker_id)
        if len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)
