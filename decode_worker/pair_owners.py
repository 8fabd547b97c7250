"""Which routers want this worker to be linked to which prefill workers. A core."""

from __future__ import annotations

from engine.router_messages import Owner
from transfer.handoff import Peer


class PairOwners:
    """A pair lasts as long as any router wants it."""

    def __init__(self) -> None:
        self._owners: dict[Peer, set[Owner]] = {}

    def add(self, owner: Owner, peer: Peer) -> None:
        self._owners.setdefault(peer, set()).add(owner)

    def remove(self, owner: Owner, peer: Peer) -> bool:
        """Whether it was the last one to want this pair."""
        owners = self._owners.get(peer, set())
        owners.discard(owner)
        return not owners and self._owners.pop(peer, None) is not None

    def remove_all(self, owner: Owner) -> list[Peer]:
        """The router is gone; those that nobody else wants."""
        return [peer for peer in list(self._owners) if self.remove(owner, peer)]

    def of(self, peer: Peer) -> set[Owner]:
        """Who is to be told of the pair."""
        return self._owners.get(peer, set())
