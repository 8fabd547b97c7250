"""The decode worker's half of every hand-off. A core; handoff.py has the whole picture.

      reserve               link up               offered                 fetched
    ----------> CONNECTING ---------> RESERVED -------------> FETCHING ------------> Deliver, gone
                    |                    |                       |
                    | cancel             | cancel                | fetch failed: Free + Fail, gone
                    | link failed        | withdrawn             |
                    | lease end          | link lost             | cancel, withdrawn, lease end
                    v                    | lease end             v
               Free, gone                v                  DISCARDING -----------> Free, gone
                                    Free, gone                       fetched or fetch failed

A copy that runs is never interrupted and its target never freed: DISCARDING waits for its end. A link that
is lost under a copy does not matter by itself: the generations decide whether the copy is good.
An event that a state does not know is ignored; an offer or withdraw that finds no entry is answered with
drop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from engine.sequence import RequestKey
from transfer.errors import HandoffError
from transfer.handoff import (
    ConfirmReserved,
    Connect,
    Deliver,
    Fail,
    Fetch,
    Free,
    HandoffFailure,
    LinkId,
    Offered,
    Peer,
    PullAction,
    SendAcknowledge,
    SendDrop,
)


class PullState(Enum):
    CONNECTING = "connecting"
    RESERVED = "reserved"
    FETCHING = "fetching"
    DISCARDING = "discarding"


@dataclass(slots=True)
class _Entry:
    peer: Peer
    num_tokens: int
    num_prompt_blocks: int
    blocks: tuple[int, ...]
    state: PullState
    lease_end_s: float
    link: LinkId | None = None
    offered_s: float = 0.0
    first_token: int = 0


class PullSide:
    """All hand-offs that this decode worker has set blocks aside for.

    lease_s: how long blocks stay set aside without news from the prefill worker.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._entries: dict[RequestKey, _Entry] = {}
        self._links: dict[LinkId, Peer] = {}
        self._link_of: dict[Peer, LinkId] = {}
        self._dialling: set[Peer] = set()

    def reserve(
        self,
        key: RequestKey,
        peer: Peer,
        address: str,
        num_tokens: int,
        num_prompt_blocks: int,
        blocks: Sequence[int],
        now: float,
    ) -> list[PullAction]:
        """Blocks are set aside (TRANSFER reference) for the prompt and more.

        The first num_prompt_blocks of them take the KV of the prompt's num_tokens tokens.
        """
        if key in self._entries:
            raise HandoffError(f"{key} is reserved already")
        link = self._link_of.get(peer)
        state = PullState.CONNECTING if link is None else PullState.RESERVED
        self._entries[key] = _Entry(
            peer, num_tokens, num_prompt_blocks, tuple(blocks), state, now + self._lease_s, link
        )
        if link is not None:
            return [ConfirmReserved(key)]
        # Even if those who asked for the link have left: a second one to the same peer would end the first.
        if peer in self._dialling:
            return []
        self._dialling.add(peer)
        return [Connect(peer, address)]

    def link_up(self, link: LinkId, peer: Peer, now: float) -> list[PullAction]:
        """A link that was dialled stands; a link that there was to the same peer is over."""
        actions: list[PullAction] = []
        if (old := self._link_of.get(peer)) is not None:
            actions += self.link_lost(old)
        self._dialling.discard(peer)
        self._links[link] = peer
        self._link_of[peer] = link
        for key, entry in self._entries.items():
            if entry.state is PullState.CONNECTING and entry.peer == peer:
                entry.state, entry.link, entry.lease_end_s = PullState.RESERVED, link, now + self._lease_s
                actions.append(ConfirmReserved(key))
        return actions

    def link_failed(self, peer: Peer, reason: HandoffFailure, message: str) -> list[PullAction]:
        """The peer could not be reached or does not fit."""
        self._dialling.discard(peer)
        waiting = [k for k, e in self._entries.items() if e.state is PullState.CONNECTING and e.peer == peer]
        return [action for key in waiting for action in (Fail(key, reason, message), self._free(key))]

    def link_lost(self, link: LinkId) -> list[PullAction]:
        """The link is closed. What was reserved over it fails; a copy goes on and is judged when it ends."""
        peer = self._links.pop(link, None)
        if peer is None:
            return []
        del self._link_of[peer]
        actions: list[PullAction] = []
        for key, entry in list(self._entries.items()):
            if entry.link != link:
                continue
            match entry.state:
                case PullState.RESERVED:
                    message = f"the link to {peer} broke before the prompt's KV was offered"
                    actions += [Fail(key, HandoffFailure.PEER_UNREACHABLE, message), self._free(key)]
                case PullState.FETCHING | PullState.DISCARDING | PullState.CONNECTING:
                    pass
        return actions

    def offered(self, link: LinkId, offered: Offered, arrived_s: float) -> list[PullAction]:
        """The KV of the prompt may be copied."""
        key = offered.key
        entry = self._entries.get(key)
        if entry is None or entry.link != link:
            return [SendDrop(link, key)]
        if entry.state is not PullState.RESERVED:
            return []
        wanted, given = entry.num_prompt_blocks, len(offered.blocks)
        if offered.num_tokens != entry.num_tokens or wanted != given or given != len(offered.generations):
            message = (
                f"{entry.peer} offered {offered.num_tokens} tokens in {given} blocks with "
                f"{len(offered.generations)} generations; reserved are {entry.num_tokens} in {wanted}"
            )
            fail = Fail(key, HandoffFailure.TRANSFER_FAILED, message)
            return [fail, self._free(key), SendDrop(link, key)]
        entry.state = PullState.FETCHING
        entry.offered_s, entry.first_token = arrived_s, offered.first_token
        entry.lease_end_s = max(entry.lease_end_s, arrived_s + self._lease_s)
        return [Fetch(link, offered, entry.blocks[:wanted])]

    def withdrawn(self, link: LinkId, key: RequestKey) -> list[PullAction]:
        """No offer will come, or the one that came is taken back; the prefill worker tells the router."""
        entry = self._entries.get(key)
        if entry is None or entry.link != link:
            return [SendDrop(link, key)]
        return self._give_up(key, entry)

    def cancel(self, key: RequestKey) -> list[PullAction]:
        """The router does not want the request any more. Legal in every state and for unknown keys."""
        entry = self._entries.get(key)
        return [] if entry is None else self._give_up(key, entry)

    def fetched(self, key: RequestKey, ended_s: float) -> list[PullAction]:
        """The copy ended and the generations held."""
        entry = self._copied(key)
        if entry.state is PullState.DISCARDING:
            return [self._free(key), *self._drop(key, entry)]
        del self._entries[key]
        actions: list[PullAction] = []
        if entry.link is not None and entry.link in self._links:
            actions.append(SendAcknowledge(entry.link, key))
        transfer_s = ended_s - entry.offered_s
        return [*actions, Deliver(key, entry.blocks, entry.first_token, transfer_s, ended_s)]

    def fetch_failed(self, key: RequestKey, message: str) -> list[PullAction]:
        """The copy ended without a result: stale generations, or the backend failed."""
        entry = self._copied(key)
        actions: list[PullAction] = []
        if entry.state is PullState.FETCHING:
            actions.append(Fail(key, HandoffFailure.TRANSFER_FAILED, message))
        return [*actions, self._free(key), *self._drop(key, entry)]

    def renewed(self, link: LinkId, keys: Iterable[RequestKey], arrived_s: float) -> None:
        """The prefill worker still means to offer these, or has them on offer."""
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None and entry.link == link:
                entry.lease_end_s = max(entry.lease_end_s, arrived_s + self._lease_s)

    def tick(self, now: float) -> list[PullAction]:
        """End leases whose time is over; call it when all that has arrived is told."""
        actions: list[PullAction] = []
        for key, entry in list(self._entries.items()):
            if entry.state is not PullState.DISCARDING and entry.lease_end_s <= now:
                message = f"no news from {entry.peer} for {self._lease_s} s while {entry.state.value}"
                actions += [Fail(key, HandoffFailure.LEASE_EXPIRED, message), *self._give_up(key, entry)]
        return actions

    def deadline(self) -> float | None:
        """When `tick` has something to do next; None while no lease runs."""
        ends = (e.lease_end_s for e in self._entries.values() if e.state is not PullState.DISCARDING)
        return min(ends, default=None)

    @property
    def num_blocks(self) -> int:
        """Blocks that carry a TRANSFER reference of ours."""
        return sum(len(entry.blocks) for entry in self._entries.values())

    def counts(self) -> dict[PullState, int]:
        """Entries in each state."""
        found = Counter(entry.state for entry in self._entries.values())
        return {state: found[state] for state in PullState}

    def _give_up(self, key: RequestKey, entry: _Entry) -> list[PullAction]:
        match entry.state:
            case PullState.CONNECTING | PullState.RESERVED:
                return [self._free(key), *self._drop(key, entry)]
            case PullState.FETCHING:
                entry.state = PullState.DISCARDING
                return []
            case PullState.DISCARDING:
                return []

    def _copied(self, key: RequestKey) -> _Entry:
        entry = self._entries.get(key)
        if entry is None or entry.state not in (PullState.FETCHING, PullState.DISCARDING):
            raise HandoffError(f"a copy for {key} ended that was never started")
        return entry

    def _drop(self, key: RequestKey, entry: _Entry) -> list[PullAction]:
        return [SendDrop(entry.link, key)] if entry.link in self._links else []

    def _free(self, key: RequestKey) -> Free:
        return Free(key, self._entries.pop(key).blocks)
