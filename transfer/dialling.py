"""Which prefill workers a decode worker wants to be linked to, and which it is. A core, part of pull_side.

     want                 linked
    ------> DIALLING ---------------> UP
              ^ |                     |
              | | failed              | lost: dial at once
              | v                     |
            WAITING <-----------------+          failed with a mismatch: REFUSED, until `forget` or a request
           (backoff, doubling)

A peer is one life of a worker: its successor is another peer. `forget` is legal in every state. A peer is
never dialled twice at the same time: one that is forgotten while it is dialled is known until the answer
comes. One that was only wanted for a request (at_once) is forgotten when its link fails or is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

from transfer.handoff import Connect, Disconnect, HandoffFailure, LinkId, PairChanged, Peer, PullAction

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0


@dataclass(slots=True)
class _State:
    """is_kept: wanted for itself. is_wanted: that, or for a request; False if it was forgotten while dialled.
    dial_at: when to dial; None while it is dialled, linked, or refused."""

    address: str
    is_kept: bool
    is_wanted: bool = True
    link: LinkId | None = None
    dialling: bool = True
    dial_at: float | None = None
    backoff_s: float = FIRST_BACKOFF_S
    # What the routers were told last.
    told: PairChanged | None = None


class Dialling:
    """Peers by life."""

    def __init__(self) -> None:
        self._peers: dict[Peer, _State] = {}
        self._links: dict[LinkId, Peer] = {}

    def want(self, peer: Peer, address: str, now: float, *, at_once: bool = False) -> list[PullAction]:
        """Be linked to it; at_once: for a request. One that is known already: say again how it stands, and,
        with at_once, do not wait until the next attempt is due."""
        state = self._peers.get(peer)
        if state is None:
            self._peers[peer] = _State(address, is_kept=not at_once)
            return [Connect(peer, address)]
        state.is_wanted = True
        state.is_kept = state.is_kept or not at_once
        if at_once and state.link is None and not state.dialling:
            return [self._dial(peer, state)]
        return [] if state.told is None else [state.told]

    def forget(self, peer: Peer) -> tuple[LinkId | None, list[PullAction]]:
        """The link that there was, and what closes it."""
        state = self._peers.get(peer)
        if state is None:
            return None, []
        if state.dialling:
            state.is_wanted = state.is_kept = False
            state.told = None
            return None, []
        del self._peers[peer]
        if state.link is None:
            return None, []
        del self._links[state.link]
        return state.link, [Disconnect(state.link)]

    def linked(self, link: LinkId, peer: Peer, backend: str) -> list[PullAction]:
        """A link that was dialled stands. One to a peer that was forgotten meanwhile is closed."""
        state = self._peers.get(peer)
        if state is None or not state.is_wanted:
            self._peers.pop(peer, None)
            return [Disconnect(link)]
        state.link, state.dialling, state.dial_at = link, False, None
        state.backoff_s = FIRST_BACKOFF_S
        self._links[link] = peer
        return self._tell(state, PairChanged(peer, None, backend))

    def failed(self, peer: Peer, reason: HandoffFailure, message: str, now: float) -> list[PullAction]:
        """Dialling came to nothing; tried again later, unless the two will never fit."""
        state = self._peers.get(peer)
        if state is None or not state.dialling:
            return []
        if not state.is_kept:
            del self._peers[peer]
            return []
        state.dialling = False
        if reason is not HandoffFailure.PEER_MISMATCH:
            state.dial_at = now + state.backoff_s
            state.backoff_s = min(2 * state.backoff_s, MAX_BACKOFF_S)
        return self._tell(state, PairChanged(peer, reason, message))

    def lost(self, link: LinkId, now: float) -> tuple[Peer | None, list[PullAction]]:
        """The peer of a link that was up, which is dialled anew; None if it is known to be over."""
        peer = self._links.pop(link, None)
        if peer is None:
            return None, []
        state = self._peers[peer]
        if not state.is_kept:
            del self._peers[peer]
            return peer, []
        state.link, state.dial_at = None, now
        message = f"the link to {peer} is lost, and dialled again"
        return peer, self._tell(state, PairChanged(peer, HandoffFailure.PEER_UNREACHABLE, message))

    def tick(self, now: float) -> list[PullAction]:
        """Dial whom it is time to dial."""
        actions: list[PullAction] = []
        for peer, state in self._peers.items():
            if state.dial_at is not None and state.dial_at <= now:
                actions.append(self._dial(peer, state))
        return actions

    def deadline(self) -> float | None:
        """When `tick` has something to do next."""
        return min((s.dial_at for s in self._peers.values() if s.dial_at is not None), default=None)

    def link_of(self, peer: Peer) -> LinkId | None:
        state = self._peers.get(peer)
        return None if state is None else state.link

    def is_up(self, link: LinkId) -> bool:
        return link in self._links

    def _dial(self, peer: Peer, state: _State) -> Connect:
        state.dialling, state.dial_at = True, None
        return Connect(peer, state.address)

    def _tell(self, state: _State, change: PairChanged) -> list[PullAction]:
        known = state.told is not None and state.told.reason == change.reason
        state.told = change
        return [] if known else [change]
