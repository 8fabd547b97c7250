"""Which workers a decision weighs: all of a small pool, some of a large one.

So a decision costs the same with a thousand workers as with some dozens, and several routers that see the
same figures do not all send their next request to the same worker. That some drawn at random are nearly as
good as all is the power of choices; with the best of the last times among them it holds for unequal workers
(Mitzenmacher, Prabhakar and Shah, "Load Balancing with Memory", FOCS 2002).

    placeable --draw--> MOST_LOOKED_AT, holders, remembered --with room, least load--> MOST_WEIGHED, holders
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from router.pool_view import PoolView, Role, WorkerView
from router.prefix_index import PrefixIndex
from router.requests import Request

MOST_LOOKED_AT = 32
MOST_WEIGHED = 8
_REMEMBERED = 4


class Candidates:
    """Of the workers of some roles that new requests go to. load: a figure that costs next to nothing, to
    choose by who is worth an estimate."""

    def __init__(
        self,
        pool: PoolView,
        prefixes: PrefixIndex,
        rng: random.Random,
        roles: tuple[Role, ...],
        load: Callable[[WorkerView], int],
    ) -> None:
        self._pool = pool
        self._prefixes = prefixes
        self._rng = rng
        self._roles = roles
        self._load = load
        self._remembered: OrderedDict[str, None] = OrderedDict()

    def look(self, request: Request, has_room: Callable[[WorkerView], bool]) -> Sequence[WorkerView]:
        """Those with room, a few at most; who holds a part of the prompt's KV is among them."""
        workers = self._pool.placeable(*self._roles)
        if len(workers) <= MOST_WEIGHED:
            return [one for one in workers if has_room(one)]
        holders = self._prefixes.holders(request)
        if len(workers) > MOST_LOOKED_AT:
            drawn = {one.worker_id: one for one in self._rng.sample(workers, MOST_LOOKED_AT)}
            drawn |= {one.worker_id: one for one in self._known((*holders, *self._remembered))}
            workers = tuple(drawn.values())
        roomy = filter(has_room, sorted(workers, key=self._load))
        weighed = {one.worker_id: one for one in islice(roomy, MOST_WEIGHED)}
        weighed |= {one.worker_id: one for one in self._known(holders) if has_room(one)}
        return tuple(weighed.values())

    def remember(self, worker_id: str) -> None:
        """It was among the best."""
        self._remembered[worker_id] = None
        self._remembered.move_to_end(worker_id)
        if len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)

    def _known(self, worker_ids: Iterable[str]) -> Sequence[WorkerView]:
        """Of these, the ones that could be drawn."""
        found = (self._pool.get(worker_id) for worker_id in worker_ids)
        return [one for one in found if one and one.role in self._roles and one.takes_new]
