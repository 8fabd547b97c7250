"""The prefill worker's half of every hand-off. A core; handoff.py has the whole picture.

      promise                offer                  withdraw
    ----------> PROMISED ------------> OFFERED ------------------> WITHDRAWN
                   |                      |                            |
                   | withdraw             | acknowledged, dropped      | acknowledged, dropped
                   v                      | link lost                  | link lost
                 gone                     | lease end: fence           | lease end: fence
                                          v                            v
                                     Free, gone                   Free, gone

PROMISED holds no blocks here (the scheduler does): it stands for those that the peer has set aside. An
event that a state does not know is ignored: it is late news about something that has been settled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from engine.sequence import RequestKey
from transfer.errors import HandoffError
from transfer.handoff import (
    Fail,
    Fence,
    Free,
    HandoffFailure,
    LinkId,
    OfferAction,
    Offered,
    Peer,
    SendOffer,
    SendWithdraw,
)


class OfferState(Enum):
    PROMISED = "promised"
    OFFERED = "offered"
    WITHDRAWN = "withdrawn"


@dataclass(slots=True)
class _Entry:
    peer: Peer
    state: OfferState
    link: LinkId | None = None
    blocks: tuple[int, ...] = ()
    lease_end_s: float = 0.0


class OfferSide:
    """All hand-offs that this prefill worker owes or has open.

    lease_s: how long an offer stands without news from its puller.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._entries: dict[RequestKey, _Entry] = {}
        self._links: dict[LinkId, Peer] = {}
        self._link_of: dict[Peer, LinkId] = {}

    def link_up(self, link: LinkId, peer: Peer) -> list[OfferAction]:
        """A puller's handshake fitted. A link that the same worker had before is over."""
        actions: list[OfferAction] = []
        for old, old_peer in list(self._links.items()):
            if old_peer.worker_id == peer.worker_id:
                actions += self._fence(old, f"{peer} opened a new link")
        self._links[link] = peer
        self._link_of[peer] = link
        return actions

    def link_lost(self, link: LinkId) -> list[OfferAction]:
        """The link is closed. Who still reads what was offered on it finds out by the generations."""
        peer = self._links.pop(link, None)
        if peer is None:
            return []
        del self._link_of[peer]
        return [self._free(key) for key, entry in list(self._entries.items()) if entry.link == link]

    def promise(self, key: RequestKey, peer: Peer) -> None:
        """The prompt is here: an offer or a withdraw will follow."""
        if key in self._entries:
            raise HandoffError(f"{key} is promised already")
        self._entries[key] = _Entry(peer, OfferState.PROMISED)

    def offer(
        self,
        key: RequestKey,
        blocks: Sequence[int],
        generations: Sequence[int],
        num_tokens: int,
        first_token: int,
        now: float,
    ) -> list[OfferAction]:
        """The prompt is computed; its blocks carry a TRANSFER reference from here until Free."""
        entry = self._entries.get(key)
        if entry is None or entry.state is not OfferState.PROMISED:
            raise HandoffError(f"{key} is offered without a promise ({entry.state if entry else 'unknown'})")
        entry.blocks = tuple(blocks)
        entry.link = self._link_of.get(entry.peer)
        if entry.link is None:
            message = f"no link from {entry.peer} to hand the prompt's KV over"
            return [Fail(key, HandoffFailure.PEER_UNREACHABLE, message), self._free(key)]
        entry.state = OfferState.OFFERED
        entry.lease_end_s = now + self._lease_s
        return [
            SendOffer(entry.link, Offered(key, num_tokens, first_token, entry.blocks, tuple(generations)))
        ]

    def withdraw(self, key: RequestKey) -> list[OfferAction]:
        """The request is cancelled, failed, or ended with its first token. Legal at any time, for any key."""
        entry = self._entries.get(key)
        if entry is None:
            return []
        match entry.state:
            case OfferState.PROMISED:
                link = self._link_of.get(entry.peer)
                del self._entries[key]
                return [] if link is None else [SendWithdraw(link, key)]
            case OfferState.OFFERED:
                assert entry.link is not None
                entry.state = OfferState.WITHDRAWN
                return [SendWithdraw(entry.link, key)]
            case OfferState.WITHDRAWN:
                return []

    def acknowledged(self, link: LinkId, key: RequestKey) -> list[OfferAction]:
        """The puller has its copy."""
        return self._released(link, key)

    def dropped(self, link: LinkId, key: RequestKey) -> list[OfferAction]:
        """The puller does not read these blocks (any more)."""
        return self._released(link, key)

    def renewed(self, link: LinkId, keys: Iterable[RequestKey], arrived_s: float) -> None:
        """The puller still means to read these."""
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None and entry.link == link:
                entry.lease_end_s = max(entry.lease_end_s, arrived_s + self._lease_s)

    def tick(self, now: float) -> list[OfferAction]:
        """End leases whose time is over; call it when all that has arrived is told."""
        actions: list[OfferAction] = []
        for key, entry in list(self._entries.items()):
            if entry.link is not None and entry.link in self._links and entry.lease_end_s <= now:
                actions += self._fence(
                    entry.link, f"{entry.peer} left the offer of {key} without news for {self._lease_s} s"
                )
        return actions

    def deadline(self) -> float | None:
        """When `tick` has something to do next; None while no lease runs."""
        ends = (entry.lease_end_s for entry in self._entries.values() if entry.link is not None)
        return min(ends, default=None)

    @property
    def num_blocks(self) -> int:
        """Blocks that carry a TRANSFER reference of ours."""
        return sum(len(entry.blocks) for entry in self._entries.values())

    def counts(self) -> dict[OfferState, int]:
        """Entries in each state."""
        found = Counter(entry.state for entry in self._entries.values())
        return {state: found[state] for state in OfferState}

    def _released(self, link: LinkId, key: RequestKey) -> list[OfferAction]:
        entry = self._entries.get(key)
        if entry is None or entry.link != link:
            # Also PROMISED: the puller gave up early, and will drop the offer too when it comes.
            return []
        return [self._free(key)]

    def _fence(self, link: LinkId, message: str) -> list[OfferAction]:
        return [Fence(link, message), *self.link_lost(link)]

    def _free(self, key: RequestKey) -> Free:
        return Free(key, self._entries.pop(key).blocks)
