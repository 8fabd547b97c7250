"""The words of the hand-off: who the peers are, and what the two state machines ask their shells to do.

The machines themselves are `offer_side.OfferSide` (prefill worker) and `pull_side.PullSide` (decode
worker). Both are cores: events come in as method calls with the time, a list of the actions below comes
out, and the shell carries them out in order.

    prefill worker                       link                          decode worker
    promise(key)                                                       reserve(key, blocks)   blocks leased
       PROMISED     ~~~ renew ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~>     RESERVED
    prompt computed: offer(key)
       OFFERED      --- offer(blocks, generations, first token) --->     FETCHING             copy in a thread
    (blocks leased) <~~ renew ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
                                                                       copy verified: Deliver
    Free            <-- acknowledge ---------------------------------    (gone: the sequence owns its blocks)

Either side may stop at any time: the offerer with `withdraw`, the puller with `drop`.

Leases. Blocks are set aside for a peer as long as it says that it holds its half. It says so every
lease_s / 4, from the thread that carries the link, which no engine step can block: each end of a link knows
what it holds for the other from the messages that pass it (link.LinkEnd.held):
  - the offerer's a key from the moment that its `Prefill` arrives, though the engine has not seen it yet,
    until `withdraw` is sent or `acknowledge` or `drop` has come;
  - the puller's a key from the moment that its offer arrives until `acknowledge` or `drop` is sent.
And news counts from when it arrived, not from when the engine came to it: the shell stamps it, and tells it
before it calls `tick`. So a lease ends only if the peer does not know the request (its `Prefill` never
came), or is frozen or cut off as a process, never because a step of either engine takes long. It does not
watch over engines: what waits for one that is stuck is bounded by the router's Cancel (a puller frees what
is only reserved at once), by the end of the router's stream, and by the end of the process and its links.

Guarantees (property-tested in tests/transfer/test_handoff_schedules.py):
  1. Offered blocks are freed only after acknowledge or drop, or after the link they were offered on is
     closed. Giving up what they hold bumps their generation, so that a reader who is still at it finds out
     and throws its copy away.
  2. Reserved blocks are never freed while a copy into them runs.
  3. A sequence is delivered only if the generations of all its blocks still held after the copy.
  4. Every lease is renewed by the other side or ends; no entry stays for ever without a peer that holds its
     half. Steps of any length end no lease.
  5. What comes over another link than the one the entry was made on (another life, another attempt) changes
     nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from engine.sequence import RequestKey

LinkId: TypeAlias = int
"""One link between two workers, numbered by the process that holds this end; never used twice."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One life of another worker."""

    worker_id: str
    epoch: int

    def __str__(self) -> str:
        return f"{self.worker_id}@{self.epoch}"


class HandoffFailure(Enum):
    """Why a hand-off failed; the names are those of worker.proto's FailureReason."""

    PEER_UNREACHABLE = "peer_unreachable"
    PEER_MISMATCH = "peer_mismatch"
    TRANSFER_FAILED = "transfer_failed"
    LEASE_EXPIRED = "lease_expired"


@dataclass(frozen=True, slots=True)
class Offered:
    """What an offer says. generations[i] is that of blocks[i] at the time of the offer."""

    key: RequestKey
    num_tokens: int
    first_token: int
    blocks: tuple[int, ...]
    generations: tuple[int, ...]


# --- actions of both sides


@dataclass(frozen=True, slots=True)
class Free:
    """The entry is gone: drop the TRANSFER reference of these blocks of our own pool."""

    key: RequestKey
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fail:
    """Tell the router that placed the request. Comes before the Free of the same request."""

    key: RequestKey
    reason: HandoffFailure
    message: str


# --- actions of the offer side


@dataclass(frozen=True, slots=True)
class SendOffer:
    link: LinkId
    offered: Offered


@dataclass(frozen=True, slots=True)
class SendWithdraw:
    link: LinkId
    key: RequestKey


@dataclass(frozen=True, slots=True)
class Fence:
    """Close the link for good: nothing that still comes over it counts."""

    link: LinkId
    message: str


# --- actions of the pull side


@dataclass(frozen=True, slots=True)
class Connect:
    """Dial the peer; answer with `link_up` or `link_failed`."""

    peer: Peer
    address: str


@dataclass(frozen=True, slots=True)
class ConfirmReserved:
    """Tell the router that blocks and link are there."""

    key: RequestKey


@dataclass(frozen=True, slots=True)
class Fetch:
    """Copy offered.blocks of the peer into our `blocks` (same number, same order); answer with `fetched` or
    `fetch_failed`. Until then nobody else may touch `blocks`."""

    link: LinkId
    offered: Offered
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SendAcknowledge:
    link: LinkId
    key: RequestKey


@dataclass(frozen=True, slots=True)
class SendDrop:
    link: LinkId
    key: RequestKey


@dataclass(frozen=True, slots=True)
class Deliver:
    """The KV is here and verified, the entry gone: all blocks that were reserved are the sequence's now.

    transfer_s: from the arrival of the offer to the end of the copy, which was at ready_s.
    """

    key: RequestKey
    blocks: tuple[int, ...]
    first_token: int
    transfer_s: float
    ready_s: float


OfferAction: TypeAlias = Free | Fail | SendOffer | SendWithdraw | Fence
PullAction: TypeAlias = Free | Fail | Connect | ConfirmReserved | Fetch | SendAcknowledge | SendDrop | Deliver
