"""Makes pairs: every worker that writes answers (decode, mixed) is told of every prefill worker, and says how
it stands with it.

prefill worker up, or writer up  --> Pair to the writer; its PairState goes into the table
stream to either lost            --> what was known is void; the writer keeps its link
a prefill worker's life over     --> Unpair to all writers
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from prelay.v1 import worker_pb2

from router import commands
from router.live import CommandLink
from router.pair_table import LinkState, Pair, PairLink
from router.pool_view import PoolView, Role

_log = logging.getLogger(__name__)


class Pairing:
    """Sends Pair and Unpair, and keeps `pool.pairs`."""

    def __init__(self, pool: PoolView, on_change: Callable[[], None]) -> None:
        """on_change: called when the state of any pair has changed."""
        self._pool = pool
        self._on_change = on_change

    def worker_up(self, link: CommandLink, links: Iterable[CommandLink]) -> None:
        """A worker is attached. links: of all that are, itself included."""
        for other in links:
            if link.role is Role.PREFILL and other.role.writes:
                self.ask(link, other)
            elif link.role.writes and other.role is Role.PREFILL:
                self.ask(other, link)

    def life_over(self, link: CommandLink, links: Iterable[CommandLink]) -> None:
        """This life of a worker will not come back. links: of all that are attached."""
        if link.role is Role.PREFILL:
            for other in links:
                if other.role.writes:
                    other.send(commands.unpair(link.info))

    def ask(self, prefill: CommandLink, decode: CommandLink) -> None:
        """Asks who writes for the state of a pair; until it answers nothing is placed there."""
        self._put(Pair(prefill.worker_id, decode.worker_id), PairLink(LinkState.LINKING))
        decode.send(commands.pair(prefill.info))

    def on_state(self, link: CommandLink, state: worker_pb2.PairState) -> None:
        """A writer says how it stands with a prefill worker; of one that is not attached in that life nothing
        is kept."""
        prefill = self._pool.get(state.worker_id)
        known = prefill is not None and prefill.role is Role.PREFILL and prefill.up
        if prefill is None or not known or prefill.epoch != state.epoch or not link.role.writes:
            return
        now = commands.pair_link(state)
        if self._put(Pair(state.worker_id, link.worker_id), now):
            level = logging.INFO if now.state is LinkState.LINKED else logging.WARNING
            _log.log(
                level, "prefill=%s decode=%s event=pair state=%s backend=%s message=%r",
                state.worker_id, link.worker_id, now.state, state.backend, state.message,
            )  # fmt: skip

    def _put(self, pair: Pair, link: PairLink) -> bool:
        changed = self._pool.pairs.get(pair) != link
        if changed:
            self._pool.pairs.put(pair, link)
            self._on_change()
        return changed
