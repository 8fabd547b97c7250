"""The hand-off: who the peers are, what its two state machines ask their shells to do, what they guarantee.

The machines are `offer_side.OfferSide` (prefill worker) and `pull_side.PullSide` (decode worker). Both are
cores: events come in as method calls with the time, a list of the actions below comes out, and the shell
carries them out in order. Each file draws its own states; this is how they meet:

    prefill worker                        link                          decode worker
                                                                        reserve(key): blocks leased, and lent
    promise(key)                                                          to the link (Lend)
       PROMISED     ~~~ renew ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~>     RESERVED
    chunk or layer group computed: offer(key, part)
       OFFERING     --- offer(tokens, layers, blocks, generations) -->     FETCHING         copies run beside
    (blocks leased) --- offer ... ----------------------------------->                      prefill and decode
                    <~~ renew ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
    all computed: complete(key)
       OFFERED      --- complete(number of tokens, first token) ----->     FETCHING
                                                                        last copy verified: Deliver
    Free            <-- acknowledge ---------------------------------    (gone: the sequence owns its blocks)

Either side may stop at any time: the offerer with `withdraw`, the puller with `drop`.

Lending. A copy must not wait for the decode worker's engine, which may be in a step: so the engine lends the
blocks to the thread that carries the link, which starts the copy of a part when its offer arrives and reports
what it did. To have them back before the end the engine asks (Recall), and waits for the answer (`recalled`):
then no copy runs and none will start.

Leases. Blocks are set aside for a peer as long as it says that it holds its half. It says so every
lease_s / 4, from the thread that carries the link, which no engine step can block: each end of a link knows
what it holds for the other from the messages that pass it (link.LinkEnd.held):
  - the offerer's a key from the moment that its `Prefill` arrives, though the engine has not seen it yet,
    until `withdraw` is sent or `acknowledge` or `drop` has come;
  - the puller's a key from the moment that its first offer arrives until `acknowledge` or `drop` is sent.
And news counts from when it arrived, not from when the engine came to it: the shell stamps it, and tells it
before it calls `tick`. So a lease ends only if the peer does not know the request (its `Prefill` never
came), or is frozen or cut off as a process, never because a step of either engine takes long. It does not
watch over engines: what waits for one that is stuck is bounded by the router's Cancel (a puller frees what
is only reserved at once), by the end of the router's stream, and by the end of the process and its links.

Guarantees (property-tested in tests/transfer/test_handoff_schedules.py). In this list "freed" means that the
TRANSFER reference is dropped, on which nothing else that holds the block depends.
  1. Offered blocks are freed only after acknowledge or drop, or after the link they were offered on is
     closed. Never because time has passed: when a lease ends the link is closed first (Fence). Giving up
     what they hold bumps their generation, so that a reader who is still at it finds out and throws its
     copy away.
  2. Lent blocks are never freed while a copy into them runs or could start.
  3. A sequence is delivered once, and only if all its tokens are there in all layers, the generations of all
     its blocks still held after each copy, and the digests of those that carry one agreed.
  4. Every lease is renewed by the other side or ends; no entry stays for ever without a peer that holds its
     half. Steps of any length end no lease.
  5. What comes over another link than the one the entry was made on (another life, another attempt) changes
     nothing.
  6. One failed hand-off, or one failed handshake, fails the requests that it concerns, and nothing else.
Not guaranteed: that a hand-off succeeds. Whoever placed the request is told that it failed, and places it
again (router/recovery.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from engine.sequence import RequestKey
from transfer.layout import Part

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
class Lease:
    """Add a TRANSFER reference to these blocks of our own pool."""

    key: RequestKey
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Abandon:
    """Nobody will take the prompt: stop computing it. The router learns of it from the other side."""

    key: RequestKey


@dataclass(frozen=True, slots=True)
class SendOffer:
    link: LinkId
    key: RequestKey
    part: Part


@dataclass(frozen=True, slots=True)
class SendComplete:
    link: LinkId
    key: RequestKey
    num_tokens: int
    first_token: int


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
class Disconnect:
    """Close the link for good."""

    link: LinkId


@dataclass(frozen=True, slots=True)
class PairChanged:
    """Tell the routers that asked for this pair. reason: None when it is linked. message: then the backend,
    else what is wrong."""

    peer: Peer
    reason: HandoffFailure | None
    message: str


@dataclass(frozen=True, slots=True)
class Lend:
    """From now on copy what is offered for `key` on `link` into `table`, the blocks of the whole sequence,
    but for the first skip_tokens. Tell of each offer (`offered`) and of each copy's end (`fetched`,
    `fetch_failed`); the two come in this order for each part, and so do the parts. Ends by itself when
    `complete` has come and its copies have ended."""

    link: LinkId
    key: RequestKey
    table: tuple[int, ...]
    skip_tokens: int


@dataclass(frozen=True, slots=True)
class Recall:
    """Start no more copies for `key`; when the last one has ended, answer with `recalled`."""

    key: RequestKey


@dataclass(frozen=True, slots=True)
class ConfirmReserved:
    """Tell the router that blocks and link are there."""

    key: RequestKey


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

    transfer_s: from the arrival of `complete` to the end of the last copy, 0 if that was earlier: what the
    hand-off cost the request. ready_s: when both had come.
    """

    key: RequestKey
    blocks: tuple[int, ...]
    first_token: int
    transfer_s: float
    ready_s: float


OfferAction: TypeAlias = Free | Fail | Lease | Abandon | SendOffer | SendComplete | SendWithdraw | Fence
PullAction: TypeAlias = (
    Free
    | Fail
    | Connect
    | Disconnect
    | PairChanged
    | Lend
    | Recall
    | ConfirmReserved
    | SendAcknowledge
    | SendDrop
    | Deliver
)
