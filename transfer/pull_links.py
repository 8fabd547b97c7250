"""The decode worker's ends of its links: dials prefill workers, and copies what they offer in a thread.

A copy begins when its offer arrives, if the engine has lent blocks for it (handoff.py): the engine, which may
be in a step, is told of both but not waited for.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from prelay.v1 import transfer_pb2, transfer_pb2_grpc

from engine.link_secret import metadata_of, proof_of
from engine.sequence import RequestKey
from engine.tls import Identity, dial
from transfer.base import Backend, KvMemory, Pull
from transfer.digest import check_digests
from transfer.errors import (
    DigestError,
    PeerMismatchError,
    PeerUnreachableError,
    StaleBlocksError,
    TransferError,
)
from transfer.handoff import HandoffFailure, Lend, LinkId, Peer
from transfer.handshake import check_fits, check_is, layout_of
from transfer.layout import Part, Route
from transfer.link import (
    FetchDone,
    FromOfferer,
    LinkEnd,
    LinkFailed,
    LinkLost,
    LinkUp,
    PullLinkEvent,
    Recalled,
    part_of,
    request_key,
    wire_key,
)

_log = logging.getLogger(__name__)

DIAL_TIMEOUT_S = 1.5
"""For connection and handshake together: a pair that cannot be made must fail soon."""

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    # A new life behind an old address gets a connection of its own, not the old one's back-off.
    ("grpc.use_local_subchannel_pool", 1),
)

_End = LinkEnd[transfer_pb2.OffererMessage, transfer_pb2.PullerMessage]


@dataclass(frozen=True, slots=True)
class _Opened:
    """The peer's memory, and the way from its layout to ours. copier: one thread, so copies from one peer end
    in the order of its offers, and a peer that is slow keeps nobody else waiting."""

    backend: str
    pull: Pull
    route: Route
    copier: ThreadPoolExecutor


class PullLinks:
    """Everything here but the copies runs in the asyncio thread; what happens is told through `post`.

    memory: ours, into which is copied. backends: those that we have; the handshake names them, best first.
    secret, identity: with which peers are dialled.
    """

    def __init__(
        self,
        handshake: transfer_pb2.Handshake,
        memory: KvMemory,
        backends: Sequence[Backend],
        lease_s: float,
        post: Callable[[PullLinkEvent], None],
        clock: Callable[[], float],
        secret: str = "",
        identity: Identity | None = None,
    ) -> None:
        self._handshake = handshake
        self._secret = secret
        self._identity = identity
        self._memory = memory
        self._backends = {backend.name: backend for backend in backends}
        self._lease_s = lease_s
        self._post = post
        self._clock = clock
        self._ids = itertools.count(1)
        self._ends: dict[LinkId, _End] = {}
        self._opened: dict[LinkId, _Opened] = {}
        # Requests that offers may be copied for.
        self._lent: dict[RequestKey, Lend] = {}
        self._copies = _Copies(post)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    def connect(self, peer: Peer, address: str) -> None:
        """Dial; LinkUp or LinkFailed follows, and after LinkUp some day LinkLost."""
        if self._stopping:
            return
        self._loop = asyncio.get_running_loop()
        task = asyncio.create_task(self._live(peer, address))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def send_acknowledge(self, link: LinkId, key: RequestKey) -> None:
        self._answer(link, key, transfer_pb2.PullerMessage(acknowledge=wire_key(key)))

    def send_drop(self, link: LinkId, key: RequestKey) -> None:
        self._answer(link, key, transfer_pb2.PullerMessage(drop=wire_key(key)))

    def disconnect(self, link: LinkId) -> None:
        """LinkLost follows, if it has not been lost already."""
        if (end := self._ends.get(link)) is not None:
            end.close("this life of the peer is over")

    def lend(self, lend: Lend) -> None:
        """Copy what is offered; FetchDone follows each offer. A copy whose link ends meanwhile goes on."""
        self._lent[lend.key] = lend

    def recall(self, key: RequestKey) -> None:
        """Recalled follows, behind the copies that still run or wait."""
        self._lent.pop(key, None)
        self._copies.recall(key)

    async def stop(self) -> None:
        """Close all links. Waits for no copy."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def copies_end(self, timeout_s: float) -> bool:
        """After `stop`: whether all copies, which write into our memory, have ended within that time."""
        return await asyncio.to_thread(self._copies.wait, timeout_s)

    async def _live(self, peer: Peer, address: str) -> None:
        """One link, from dialling to its end."""
        async with dial(address, self._identity, _CHANNEL_OPTIONS) as channel:
            try:
                call, opened = await self._dial(channel, peer, address)
            except (PeerMismatchError, PeerUnreachableError) as error:
                mismatch = isinstance(error, PeerMismatchError)
                reason = HandoffFailure.PEER_MISMATCH if mismatch else HandoffFailure.PEER_UNREACHABLE
                _log.warning("event=link_failed peer=%s address=%s why=%r", peer, address, str(error))
                self._post(LinkFailed(peer, reason, str(error)))
                return
            except Exception as error:
                # Whatever it is, it must be told: the engine waits for an answer and dials no second time.
                _log.exception("event=link_failed peer=%s address=%s", peer, address)
                message = f"the link to {peer} cannot be opened: {error!r}"
                self._post(LinkFailed(peer, HandoffFailure.PEER_UNREACHABLE, message))
                return
            link = next(self._ids)
            end = _End(self._lease_s, wrap=lambda renew: transfer_pb2.PullerMessage(renew=renew))
            self._ends[link], self._opened[link] = end, opened
            self._post(LinkUp(link, peer, opened.backend))
            _log.info("event=link_up link=%d peer=%s backend=%s", link, peer, opened.backend)
            why = "we are stopping"
            try:
                why = await end.run(call, lambda message: self._receive(link, end, message))
            finally:
                call.cancel()
                del self._ends[link], self._opened[link]
                # Behind the copies that still run or wait.
                opened.copier.submit(opened.pull.close)
                opened.copier.shutdown(wait=False)
                self._post(LinkLost(link, why))
                _log.info("event=link_lost link=%d peer=%s why=%r", link, peer, why)

    def _receive(self, link: LinkId, end: _End, message: transfer_pb2.OffererMessage) -> None:
        match message.WhichOneof("message"):
            case "renew" if not message.renew.keys:
                return  # the link's own sign of life: an idle engine sleeps through it
            case "offer":
                end.held.add(request_key(message.offer.key))
            case "complete":
                end.held.add(request_key(message.complete.key))
        self._post(FromOfferer(link, message, self._clock()))
        match message.WhichOneof("message"):
            case "offer":
                lend = self._lent.get(request_key(message.offer.key))
                if lend is not None and lend.link == link and not self._stopping:
                    opened = self._opened[link]
                    self._copies.begin(lend.key)
                    opened.copier.submit(self._copy, link, opened, lend, part_of(message.offer))
            case "complete":
                # What is delivered now must not be written again, whatever is still offered.
                key = request_key(message.complete.key)
                if key in self._lent and self._lent[key].link == link:
                    del self._lent[key]

    def _answer(self, link: LinkId, key: RequestKey, message: transfer_pb2.PullerMessage) -> None:
        """To nobody, if the link has ended: its end is told of separately."""
        if (end := self._ends.get(link)) is not None:
            end.held.discard(key)
            end.send(message)

    async def _dial(self, channel: grpc.aio.Channel, peer: Peer, address: str) -> tuple[Any, _Opened]:
        """The call with its handshake done, and the peer's memory.

        Raises PeerMismatchError or PeerUnreachableError.
        """
        proof = proof_of(self._secret, peer.worker_id, peer.epoch)
        call = transfer_pb2_grpc.KvTransferStub(channel).Link(metadata=metadata_of(proof))
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                await call.write(transfer_pb2.PullerMessage(handshake=self._handshake))
                answer = await call.read()
            if answer is grpc.aio.EOF or answer.WhichOneof("message") != "handshake":
                raise PeerUnreachableError(f"{peer} at {address} does not begin its link with a handshake")
            theirs = answer.handshake
            check_is(peer, theirs)
            check_fits(self._handshake, theirs)
            # Mapping much memory takes its time.
            return call, await asyncio.to_thread(self._open, theirs)
        except TimeoutError as error:
            call.cancel()
            raise PeerUnreachableError(
                f"{peer} at {address} does not answer within {DIAL_TIMEOUT_S} s"
            ) from error
        except grpc.aio.AioRpcError as error:
            # Another life may be there by now, which does not take the proof for this one.
            if error.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAUTHENTICATED):
                raise PeerMismatchError(error.details()) from error
            message = f"{peer} at {address}: {error.code().name} {error.details()}"
            raise PeerUnreachableError(message) from error
        except TransferError as error:
            call.cancel()
            if isinstance(error, PeerMismatchError | PeerUnreachableError):
                raise
            raise PeerUnreachableError(f"{peer} at {address}: {error}") from error
        except BaseException:
            call.cancel()
            raise

    def _open(self, theirs: transfer_pb2.Handshake) -> _Opened:
        chosen = theirs.backends[0] if theirs.backends else "none"
        if chosen not in self._backends:
            raise PeerMismatchError(
                f"backends: {theirs.worker_id} chose {chosen}, we can use {list(self._backends)}"
            )
        route = Route(layout_of(theirs), self._memory.layout)
        pull = self._backends[chosen].connect(theirs, route)
        copier = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"prelay-pull-{theirs.worker_id}")
        return _Opened(chosen, pull, route, copier)

    def _copy(self, link: LinkId, opened: _Opened, lend: Lend, part: Part) -> None:
        """In the link's thread."""
        error: str | None = None
        is_digest_good: bool | None = None
        out_of_reach: str | None = None
        num_bytes = 0
        started_s = time.perf_counter()
        try:
            boxes = opened.route.boxes(part, lend.table, lend.skip_tokens)
            opened.pull.pull(part, boxes)
            num_bytes = sum(self._memory.num_bytes(box.target) for box in boxes)
            if part.digests:
                check_digests(self._memory, opened.route, part, boxes)
                is_digest_good = True
        except (StaleBlocksError, DigestError) as failure:
            error = str(failure)
            is_digest_good = False if isinstance(failure, DigestError) else None
        except PeerUnreachableError as failure:
            error = out_of_reach = str(failure)
        except TransferError as failure:
            error = str(failure)
        except Exception as failure:
            # The copy of one request must not end the thread that copies for all.
            _log.exception("event=copy_failed request=%s", lend.key)
            error = f"the copy failed: {failure!r}"
        copy_s = time.perf_counter() - started_s
        self._post(
            FetchDone(lend.key, opened.backend, num_bytes, copy_s, error, self._clock(), is_digest_good)
        )
        self._copies.end(lend.key)
        if out_of_reach is not None:  # not before the copy's own end is told
            self._loop.call_soon_threadsafe(self._break, link, out_of_reach)

    def _break(self, link: LinkId, why: str) -> None:
        if (end := self._ends.get(link)) is not None:
            end.close(why)


class _Copies:
    """How many copies run or wait for each request, and who is to be told when none does. Any thread."""

    def __init__(self, post: Callable[[Recalled], None]) -> None:
        self._post = post
        self._lock = threading.Condition()
        self._running: Counter[RequestKey] = Counter()
        self._recalled: set[RequestKey] = set()

    def begin(self, key: RequestKey) -> None:
        with self._lock:
            self._running[key] += 1

    def end(self, key: RequestKey) -> None:
        """Its result is posted."""
        with self._lock:
            self._running[key] -= 1
            if self._running[key]:
                return
            del self._running[key]
            self._lock.notify_all()
            if key not in self._recalled:
                return
            self._recalled.remove(key)
        self._post(Recalled(key))

    def wait(self, timeout_s: float) -> bool:
        """Until no copy runs or waits; False if that takes longer."""
        with self._lock:
            return self._lock.wait_for(lambda: not any(self._running.values()), timeout_s)

    def recall(self, key: RequestKey) -> None:
        """Recalled follows, at once if no copy is left."""
        with self._lock:
            if self._running[key]:
                self._recalled.add(key)
                return
            del self._running[key]
        self._post(Recalled(key))
