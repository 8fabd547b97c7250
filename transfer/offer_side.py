"""The prefill worker's half of every hand-off. A core; handoff.py has the whole picture.

     promise              offer               complete              withdraw
    ---------> PROMISED ---------> OFFERING ------------> OFFERED -----------> WITHDRAWN
                  |                   |  withdraw            |                     ^ |
                  |                   +----------------------|---------------------+ |
                  | withdraw          |                      |                       |
                  v                   | dropped, link lost   | acknowledged, dropped | acknowledged, dropped
                gone                  | lease end: fence     | link lost             | link lost
                                      v                      | lease end: fence      | lease end: fence
                       (Fail or Abandon,) Free, gone         v                       v
                                                         Free, gone             Free, gone

PROMISED holds no blocks here (the scheduler does): it stands for those that the peer has set aside. An
event that a state does not know is ignored: it is late news about something that has been settled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from engine.sequence import RequestKey
from transfer.errors import HandoffError
from transfer.handoff import (
    Abandon,
    Fail,
    Fence,
    Free,
    HandoffFailure,
    Lease,
    LinkId,
    OfferAction,
    Peer,
    SendComplete,
    SendOffer,
    SendWithdraw,
)
from transfer.layout import Part


class OfferState(Enum):
    PROMISED = "promised"
    OFFERING = "offering"
    OFFERED = "offered"
    WITHDRAWN = "withdrawn"


@dataclass(slots=True)
class _Entry:
    """blocks: that carry our TRANSFER reference, as a set that keeps its order."""

    peer: Peer
    state: OfferState
    link: LinkId | None = None
    blocks: dict[int, None] = field(default_factory=dict)
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
        actions: list[OfferAction] = []
        for key, entry in list(self._entries.items()):
            if entry.link == link:
                if entry.state is OfferState.OFFERING:
                    message = f"the link to {peer} broke while the prompt's KV was offered"
                    actions.append(Fail(key, HandoffFailure.PEER_UNREACHABLE, message))
                actions.append(self._free(key))
        return actions

    def promise(self, key: RequestKey, peer: Peer) -> None:
        """The prompt is here: an offer or a withdraw will follow."""
        if key in self._entries:
            raise HandoffError(f"{key} is promised already")
        self._entries[key] = _Entry(peer, OfferState.PROMISED)

    def offer(self, key: RequestKey, part: Part, now: float) -> list[OfferAction]:
        """The KV of a part is computed. Parts come in order of tokens for each layer.

        Fails if there is nobody to offer it to; the request is gone then.
        """
        entry = self._open(key, "offered")
        entry.link = entry.link or self._link_of.get(entry.peer)
        if entry.link is None:
            return self._fail_unlinked(key, entry)
        if entry.state is OfferState.PROMISED:
            entry.state = OfferState.OFFERING
            entry.lease_end_s = now + self._lease_s
        new = tuple(block for block in part.blocks if block not in entry.blocks)
        entry.blocks.update(dict.fromkeys(new))
        return [Lease(key, new), SendOffer(entry.link, key, part)]

    def complete(self, key: RequestKey, num_tokens: int, first_token: int) -> list[OfferAction]:
        """All tokens are computed and offered, and the token that follows them is drawn."""
        entry = self._open(key, "complete")
        entry.link = entry.link or self._link_of.get(entry.peer)
        if entry.link is None:
            return self._fail_unlinked(key, entry)
        entry.state = OfferState.OFFERED
        return [SendComplete(entry.link, key, num_tokens, first_token)]

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
            case OfferState.OFFERING | OfferState.OFFERED:
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

    def _open(self, key: RequestKey, what: str) -> _Entry:
        entry = self._entries.get(key)
        if entry is None or entry.state not in (OfferState.PROMISED, OfferState.OFFERING):
            raise HandoffError(f"{key} is {what} though it is {entry.state.value if entry else 'unknown'}")
        return entry

    def _fail_unlinked(self, key: RequestKey, entry: _Entry) -> list[OfferAction]:
        message = f"no link from {entry.peer} to hand the prompt's KV over"
        return [Fail(key, HandoffFailure.PEER_UNREACHABLE, message), self._free(key)]

    def _released(self, link: LinkId, key: RequestKey) -> list[OfferAction]:
        entry = self._entries.get(key)
        if entry is None or entry.link != link:
            # Also PROMISED: the puller gave up early, and will drop the offer too when it comes.
            return []
        abandon = [Abandon(key)] if entry.state is OfferState.OFFERING else []
        return [*abandon, self._free(key)]

    def _fence(self, link: LinkId, message: str) -> list[OfferAction]:
        return [Fence(link, message), *self.link_lost(link)]

    def _free(self, key: RequestKey) -> Free:
        return Free(key, tuple(self._entries.pop(key).blocks))
