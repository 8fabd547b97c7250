"""The decode worker's half of every hand-off. A core; handoff.py has the whole picture.

     reserve               link up              offered              complete, and all fetched
    ---------> CONNECTING ---------> RESERVED ----------> FETCHING ---------------------------> Deliver, gone
                   |                 (lent)   complete       |
                   | cancel             |                    | fetch failed, wrong offer: Fail
                   | link failed        | cancel             | cancel, withdrawn, lease end
                   | lease end          | withdrawn          | link lost before complete
                   v                    | link lost          |
              Free, gone                | lease end          v
                                        +--------------> RECALLED ----------> Free, gone
                                                                   recalled

Blocks that are lent are freed only when they have come back: RECALLED waits for that. A link that is lost
under a copy does not matter by itself when all is offered: the generations decide whether the copy is good.
An event that a state does not know is ignored; an offer, a complete or a withdraw that finds no entry is
answered with drop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from engine.sequence import RequestKey
from transfer.dialling import Dialling
from transfer.errors import HandoffError
from transfer.handoff import (
    ConfirmReserved,
    Deliver,
    Fail,
    Free,
    HandoffFailure,
    Lend,
    LinkId,
    Peer,
    PullAction,
    Recall,
    SendAcknowledge,
    SendDrop,
)
from transfer.layout import Part


class PullState(Enum):
    CONNECTING = "connecting"
    RESERVED = "reserved"
    FETCHING = "fetching"
    RECALLED = "recalled"


@dataclass(slots=True)
class _Entry:
    """offered_tokens: by layer, how far the offers have come. num_copying: offers whose copy has not ended.
    first_token: with `complete`, which came at completed_s."""

    peer: Peer
    num_tokens: int
    skip_tokens: int
    blocks: tuple[int, ...]
    state: PullState
    lease_end_s: float
    offered_tokens: list[int]
    link: LinkId | None = None
    num_copying: int = 0
    first_token: int | None = None
    completed_s: float = 0.0
    copied_s: float = field(default=0.0)


class PullSide:
    """All hand-offs that this decode worker has set blocks aside for, and its links to prefill workers.

    num_layers: of the model. lease_s: how long blocks stay set aside without news from the prefill worker.
    """

    def __init__(self, num_layers: int, lease_s: float) -> None:
        self._num_layers = num_layers
        self._lease_s = lease_s
        self._entries: dict[RequestKey, _Entry] = {}
        self._dialling = Dialling()

    def pair(self, peer: Peer, address: str, now: float) -> list[PullAction]:
        """Be linked to this peer, and stay so; it is told how that stands."""
        return self._dialling.want(peer, address, now)

    def unpair(self, peer: Peer) -> list[PullAction]:
        """This life of the peer is over."""
        link, actions = self._dialling.forget(peer)
        if link is not None:
            actions = [*self._link_over(link, peer), *actions]
        return [*self._fail_waiting(peer, HandoffFailure.PEER_UNREACHABLE, f"{peer} is gone"), *actions]

    def reserve(
        self,
        key: RequestKey,
        peer: Peer,
        address: str,
        num_tokens: int,
        skip_tokens: int,
        blocks: Sequence[int],
        now: float,
    ) -> list[PullAction]:
        """Blocks are set aside (TRANSFER reference) for the sequence's num_tokens tokens and more.

        skip_tokens: of its first blocks the KV is there already, and will not be written.
        """
        if key in self._entries:
            raise HandoffError(f"{key} is reserved already")
        entry = _Entry(
            peer,
            num_tokens,
            skip_tokens,
            tuple(blocks),
            PullState.CONNECTING,
            now + self._lease_s,
            [0] * self._num_layers,
        )
        self._entries[key] = entry
        link = self._dialling.link_of(peer)
        if link is not None:
            return self._lend(key, entry, link)
        return self._dialling.want(peer, address, now, at_once=True)

    def link_up(self, link: LinkId, peer: Peer, backend: str, now: float) -> list[PullAction]:
        """A link that was dialled stands; a link that there was to the same peer is over."""
        actions: list[PullAction] = []
        if (old := self._dialling.link_of(peer)) is not None:
            actions += self.link_lost(old, now)
        actions += self._dialling.linked(link, peer, backend)
        for key, entry in self._entries.items():
            if entry.state is PullState.CONNECTING and entry.peer == peer:
                entry.lease_end_s = now + self._lease_s
                actions += self._lend(key, entry, link)
        return actions

    def link_failed(self, peer: Peer, reason: HandoffFailure, message: str, now: float) -> list[PullAction]:
        """The peer could not be reached or does not fit."""
        return [
            *self._dialling.failed(peer, reason, message, now),
            *self._fail_waiting(peer, reason, message),
        ]

    def link_lost(self, link: LinkId, now: float) -> list[PullAction]:
        """The link is closed. What waits for offers fails; copies go on, and are judged at their end."""
        peer, actions = self._dialling.lost(link, now)
        # That the pair is not linked comes first: what fails must not be placed on it again.
        return actions if peer is None else [*actions, *self._link_over(link, peer)]

    def offered(self, link: LinkId, key: RequestKey, part: Part, arrived_s: float) -> list[PullAction]:
        """The KV of a part may be copied; that is under way if the blocks are lent."""
        entry = self._entries.get(key)
        if entry is None or entry.link != link:
            return [SendDrop(link, key)]
        if entry.state not in (PullState.RESERVED, PullState.FETCHING):
            return []
        entry.state = PullState.FETCHING
        entry.num_copying += 1
        entry.lease_end_s = max(entry.lease_end_s, arrived_s + self._lease_s)
        layers = range(part.start_layer, part.end_layer)
        in_order = 0 <= layers.start < layers.stop <= self._num_layers and all(
            entry.offered_tokens[layer] == part.start_token for layer in layers
        )
        late = entry.first_token is not None
        if late or not in_order or not part.start_token < part.end_token <= entry.num_tokens:
            message = (
                f"{entry.peer} offered tokens {part.start_token} to {part.end_token - 1} of layers "
                f"{layers.start} to {layers.stop - 1} late, out of order or beyond {entry.num_tokens} tokens"
            )
            return [Fail(key, HandoffFailure.TRANSFER_FAILED, message), *self._give_up(key, entry)]
        for layer in layers:
            entry.offered_tokens[layer] = part.end_token
        return []

    def completed(
        self, link: LinkId, key: RequestKey, num_tokens: int, first_token: int, arrived_s: float
    ) -> list[PullAction]:
        """All is offered; when the last copy has ended the sequence can go on with first_token."""
        entry = self._entries.get(key)
        if entry is None or entry.link != link:
            return [SendDrop(link, key)]
        if entry.state not in (PullState.RESERVED, PullState.FETCHING) or entry.first_token is not None:
            return []
        if num_tokens != entry.num_tokens or min(entry.offered_tokens) != num_tokens:
            message = (
                f"{entry.peer} offered {min(entry.offered_tokens)} tokens in all layers and calls "
                f"{num_tokens} complete; {entry.num_tokens} are reserved"
            )
            return [Fail(key, HandoffFailure.TRANSFER_FAILED, message), *self._give_up(key, entry)]
        entry.state = PullState.FETCHING
        entry.first_token, entry.completed_s = first_token, arrived_s
        entry.lease_end_s = max(entry.lease_end_s, arrived_s + self._lease_s)
        return self._deliver_if_ready(key, entry)

    def withdrawn(self, link: LinkId, key: RequestKey) -> list[PullAction]:
        """No offer will come, or those that came are taken back; the prefill worker tells the router."""
        entry = self._entries.get(key)
        if entry is None or entry.link != link:
            return [SendDrop(link, key)]
        return self._give_up(key, entry)

    def cancel(self, key: RequestKey) -> list[PullAction]:
        """The router does not want the request any more. Legal in every state and for unknown keys."""
        entry = self._entries.get(key)
        return [] if entry is None else self._give_up(key, entry)

    def fetched(self, key: RequestKey, ended_s: float) -> list[PullAction]:
        """The copy of a part ended, its generations held, and its digests, if it has any, agreed."""
        entry = self._entries.get(key)
        if entry is None or entry.state is not PullState.FETCHING:
            return []
        if not entry.num_copying:
            raise HandoffError(f"a copy for {key} ended that was never started")
        entry.num_copying -= 1
        entry.copied_s = max(entry.copied_s, ended_s)
        return self._deliver_if_ready(key, entry)

    def fetch_failed(self, key: RequestKey, message: str) -> list[PullAction]:
        """The copy of a part ended without a result: stale generations, other bytes, or no connection."""
        entry = self._entries.get(key)
        if entry is None or entry.state is not PullState.FETCHING:
            return []
        return [Fail(key, HandoffFailure.TRANSFER_FAILED, message), *self._give_up(key, entry)]

    def recalled(self, key: RequestKey) -> list[PullAction]:
        """The blocks are back: no copy runs, none will start."""
        entry = self._entries.get(key)
        if entry is None or entry.state is not PullState.RECALLED:
            raise HandoffError(f"the blocks of {key} came back though nobody asked for them")
        return [self._free(key), *self._drop(key, entry)]

    def renewed(self, link: LinkId, keys: Iterable[RequestKey], arrived_s: float) -> None:
        """The prefill worker still means to offer these, or has them on offer."""
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None and entry.link == link:
                entry.lease_end_s = max(entry.lease_end_s, arrived_s + self._lease_s)

    def tick(self, now: float) -> list[PullAction]:
        """End leases whose time is over, and dial again; call it when all that has arrived is told."""
        actions = self._dialling.tick(now)
        for key, entry in list(self._entries.items()):
            if entry.state is not PullState.RECALLED and entry.lease_end_s <= now:
                message = f"no news from {entry.peer} for {self._lease_s} s while {entry.state.value}"
                actions += [Fail(key, HandoffFailure.LEASE_EXPIRED, message), *self._give_up(key, entry)]
        return actions

    def deadline(self) -> float | None:
        """When `tick` has something to do next; None while no lease runs and nothing is to be dialled."""
        ends = [e.lease_end_s for e in self._entries.values() if e.state is not PullState.RECALLED]
        dial = self._dialling.deadline()
        return min(ends if dial is None else [*ends, dial], default=None)

    @property
    def num_blocks(self) -> int:
        """Blocks that carry a TRANSFER reference of ours."""
        return sum(len(entry.blocks) for entry in self._entries.values())

    def counts(self) -> dict[PullState, int]:
        """Entries in each state."""
        found = Counter(entry.state for entry in self._entries.values())
        return {state: found[state] for state in PullState}

    def _lend(self, key: RequestKey, entry: _Entry, link: LinkId) -> list[PullAction]:
        entry.state, entry.link = PullState.RESERVED, link
        return [Lend(link, key, entry.blocks, entry.skip_tokens), ConfirmReserved(key)]

    def _fail_waiting(self, peer: Peer, reason: HandoffFailure, message: str) -> list[PullAction]:
        waiting = [k for k, e in self._entries.items() if e.state is PullState.CONNECTING and e.peer == peer]
        return [each for key in waiting for each in (Fail(key, reason, message), self._free(key))]

    def _link_over(self, link: LinkId, peer: Peer) -> list[PullAction]:
        actions: list[PullAction] = []
        for key, entry in list(self._entries.items()):
            waits = entry.state in (PullState.RESERVED, PullState.FETCHING) and entry.first_token is None
            if entry.link == link and waits:
                message = f"the link to {peer} broke before all of the prompt's KV was offered"
                fail = Fail(key, HandoffFailure.PEER_UNREACHABLE, message)
                actions += [fail, *self._give_up(key, entry)]
        return actions

    def _deliver_if_ready(self, key: RequestKey, entry: _Entry) -> list[PullAction]:
        if entry.first_token is None or entry.num_copying:
            return []
        del self._entries[key]
        actions: list[PullAction] = []
        if entry.link is not None and self._dialling.is_up(entry.link):
            actions.append(SendAcknowledge(entry.link, key))
        ready_s = max(entry.completed_s, entry.copied_s)
        transfer_s = ready_s - entry.completed_s
        return [*actions, Deliver(key, entry.blocks, entry.first_token, transfer_s, ready_s)]

    def _give_up(self, key: RequestKey, entry: _Entry) -> list[PullAction]:
        match entry.state:
            case PullState.CONNECTING:
                return [self._free(key)]
            case PullState.RESERVED | PullState.FETCHING:
                entry.state = PullState.RECALLED
                return [Recall(key)]
            case PullState.RECALLED:
                return []

    def _drop(self, key: RequestKey, entry: _Entry) -> list[PullAction]:
        up = entry.link is not None and self._dialling.is_up(entry.link)
        return [SendDrop(entry.link, key)] if up and entry.link is not None else []

    def _free(self, key: RequestKey) -> Free:
        return Free(key, self._entries.pop(key).blocks)
