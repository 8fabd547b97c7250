"""The backend `torchdist`: KV sent over torch.distributed, between any two hosts that have a network.

Each link has a group of two of its own (pair_group.py), torn down and rebuilt alone. The offerer opens the
store where the two meet, and a thread that waits for the puller's requests:

    puller                                  offerer
    ready for bytes and generations   ->
    read request (read_request.py)    ->
                                      <-    bytes of all corners in order, packed into messages (chunks.py)
                                      <-    generations, as they are after the bytes were handed over

Gloo sends nothing before it has heard that the other end is ready, so the puller says that first. The
generations come last, so that a block that was recycled while it was read is found out. At most WINDOW
messages are under way: one is packed or unpacked while others travel. A request that cannot be served ends
the connection; the puller asks for no block that the endpoint does not promise.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
from prelay.v1 import transfer_pb2
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from transfer.base import KvMemory, check_generations
from transfer.chunks import Message, Slots, gather, in_place, messages, num_bytes, scatter
from transfer.errors import PeerMismatchError, PeerUnreachableError, TransferError
from transfer.handoff import LinkId
from transfer.host_id import host_id
from transfer.layout import Box, Part, Route
from transfer.pair_group import FOREVER, GlooDevice, PairGroup
from transfer.read_request import MAX_WORDS, ReadRequest, check_blocks, decode, encode

_log = logging.getLogger(__name__)

WINDOW = 4
PATIENCE_S = 10.0

_STORE_TIMEOUT = timedelta(seconds=10)
# What the offerer waits for in the store before it joins the group, and what it may find.
_FATE, _COME, _OVER = "fate", b"come", b"over"


class TorchDistBackend:
    """Backend over torch.distributed.

    host: address of ours that peers reach us at. patience_s: a peer that is connected and does not take or
    send what is due is given up after it.
    """

    name = "torchdist"

    def __init__(self, memory: KvMemory, host: str, patience_s: float = PATIENCE_S) -> None:
        self._memory = memory
        self._host = host
        self._patience_s = patience_s
        self._gloo = GlooDevice(host)
        self._offers: dict[LinkId, _Offer] = {}

    def reaches(self, theirs: transfer_pb2.Handshake) -> bool:
        return theirs.host_id == host_id() or not _is_loopback(self._host)

    def offer(self, link: LinkId, theirs: transfer_pb2.Handshake, answer: transfer_pb2.Handshake) -> None:
        offer = self._offers[link] = _Offer(f"link {link}", self._memory, self._host, self._join)
        answer.torchdist.CopyFrom(offer.endpoint)

    def end_offer(self, link: LinkId) -> None:
        if (offer := self._offers.pop(link, None)) is not None:
            offer.end()

    def connect(self, theirs: transfer_pb2.Handshake, route: Route) -> TorchDistPull:
        endpoint = theirs.torchdist
        if endpoint.transport != _transport(self._memory):
            raise PeerMismatchError(
                f"transport: {theirs.worker_id} sends over {endpoint.transport or 'none'}, our memory needs "
                f"{_transport(self._memory)}; use backend nixl between CUDA and CPU memory"
            )
        try:
            store = PrefixStore(endpoint.prefix, _join_store(endpoint.host, endpoint.port))
            store.set(_FATE, _COME.decode())
        except RuntimeError as error:
            raise PeerUnreachableError(
                f"{theirs.worker_id} is not at {endpoint.host}:{endpoint.port}: {error}"
            ) from error
        pull = TorchDistPull(self._join(store, 1), self._memory, endpoint.num_blocks)
        pull.pull(Part(0, 0, 0, 0, (), ()), ())  # the offerer answers
        return pull

    def _join(self, store: Store, rank: int) -> PairGroup:
        return PairGroup(store, rank, self._gloo, _on_cuda(self._memory), self._patience_s)

    def close(self) -> None:
        offers = list(self._offers.values())
        self._offers.clear()
        for offer in offers:
            offer.end()
        for offer in offers:
            offer.join()


class TorchDistPull:
    """Reads through one group. num_blocks: that the peer has."""

    def __init__(self, group: PairGroup, memory: KvMemory, num_blocks: int) -> None:
        self._group: PairGroup | None = group
        self._memory = memory
        self._num_blocks = num_blocks
        self._slots = Slots(WINDOW, memory.tensors[0].device)

    def pull(self, part: Part, boxes: Sequence[Box]) -> None:
        group = self._group
        assert group is not None
        # Looked at before anything is sent: a wrong block must not leave bytes in the connection.
        for blocks in (part.blocks, *(box.source.blocks for box in boxes)):
            check_blocks(blocks, self._num_blocks)
        request = encode(ReadRequest(part.blocks, tuple(box.source for box in boxes)))
        targets = [
            (message, in_place(self._memory, message))
            for message in messages(self._memory, [box.target for box in boxes])
        ]
        found = torch.empty(len(part.blocks), dtype=torch.int64)
        try:
            generations = group.start_receive_numbers(found)
            self._receive(group, request, targets)
            group.finish_numbers(generations)
        except BaseException:
            # What has not arrived may not be written any more.
            group.break_off()
            raise
        check_generations(part, found.numpy().astype(np.uint32))

    def close(self) -> None:
        if self._group is not None:
            self._group.break_off()
            self._group = None

    def _receive(
        self, group: PairGroup, request: torch.Tensor, targets: Sequence[tuple[Message, torch.Tensor | None]]
    ) -> None:
        # NCCL connects with the first operation, which waits for the other end's.
        ready_before = 0 if group.on_cuda else min(WINDOW, len(targets))
        window = _Window(group)
        for n in range(ready_before):
            self._start(window, n, *targets[n])
        group.send_message(request)
        for n in range(ready_before, len(targets)):
            window.make_room()
            self._start(window, n, *targets[n])
        window.finish()

    def _start(self, window: _Window, n: int, message: Message, place: torch.Tensor | None) -> None:
        if place is not None:
            window.receive(place)
        else:
            buffer = self._slots.take(n, num_bytes(self._memory, message))
            window.receive(buffer, partial(scatter, self._memory, message, buffer))


class _Offer:
    """One link's puller served by a thread, from the meeting on until either side ends it."""

    def __init__(
        self, name: str, memory: KvMemory, host: str, join_group: Callable[[Store, int], PairGroup]
    ) -> None:
        self._name = name
        self._memory = memory
        self._join_group = join_group
        self._slots = Slots(WINDOW, memory.tensors[0].device)
        self._lock = threading.Lock()
        self._group: PairGroup | None = None
        self._ended = False
        meeting = _open_store(host)
        # That links do not meet by mistake; it keeps nobody out who reaches the port (docs/security.md).
        prefix = secrets.token_hex(16)
        self._store = PrefixStore(prefix, meeting)
        self.endpoint = transfer_pb2.TorchDistEndpoint(
            host=host,
            port=meeting.port,
            prefix=prefix,
            transport=_transport(memory),
            num_blocks=len(memory.generations),
        )
        # A connection of its own, for `end` could not speak over one that waits.
        waiting = PrefixStore(prefix, _join_store(host, meeting.port))
        self._thread = threading.Thread(
            target=self._run, args=(waiting,), name=f"prelay-torchdist-{name}", daemon=True
        )
        self._thread.start()

    def end(self) -> None:
        """Does not wait for the thread."""
        with self._lock:
            self._ended = True
            group = self._group
        if group is not None:
            group.break_off()
        else:
            self._store.set(_FATE, _OVER.decode())

    def join(self) -> None:
        self._thread.join(timeout=_STORE_TIMEOUT.total_seconds())

    def _run(self, store: PrefixStore) -> None:
        try:
            store.wait([_FATE], FOREVER)
            if store.get(_FATE) == _COME:
                self._serve(self._join_group(store, 0))
        except (TransferError, RuntimeError) as error:
            _log.info("event=torchdist_offer_ended offer=%r why=%r", self._name, str(error))
        except Exception:
            # The puller finds its connection closed; others have threads of their own.
            _log.exception("event=torchdist_offer_failed offer=%r", self._name)

    def _serve(self, group: PairGroup) -> None:
        with self._lock:
            if self._ended:
                return
            self._group = group
        try:
            while True:
                self._answer(group, group.receive_message(MAX_WORDS, FOREVER))
        finally:
            with self._lock:
                self._group = None
            group.break_off()

    def _answer(self, group: PairGroup, words: torch.Tensor) -> None:
        request = decode(words, self._memory)
        window = _Window(group)
        for n, message in enumerate(messages(self._memory, request.corners)):
            window.make_room()
            data = in_place(self._memory, message)
            if data is None:
                data = self._slots.take(n, num_bytes(self._memory, message))
                gather(self._memory, message, data)
            window.send(data)
        window.finish()
        generations = self._memory.generations[list(request.blocks)].astype(np.int64)
        group.send_numbers(torch.from_numpy(generations))


class _Window:
    """Operations under way, at most WINDOW; the oldest is finished first."""

    def __init__(self, group: PairGroup) -> None:
        self._group = group
        self._started: deque[tuple[Any, Callable[[], None] | None]] = deque()

    def make_room(self) -> None:
        if len(self._started) == WINDOW:
            self._finish_one()

    def send(self, data: torch.Tensor) -> None:
        self._started.append((self._group.start_send(data), None))

    def receive(self, data: torch.Tensor, then: Callable[[], None] | None = None) -> None:
        """then: called when they are there."""
        self._started.append((self._group.start_receive(data), then))

    def finish(self) -> None:
        """Of all of them."""
        while self._started:
            self._finish_one()
        self._group.drain()

    def _finish_one(self) -> None:
        started, then = self._started.popleft()
        self._group.finish(started)
        if then is not None:
            then()


def _on_cuda(memory: KvMemory) -> bool:
    return memory.tensors[0].is_cuda


def _transport(memory: KvMemory) -> str:
    return "nccl" if _on_cuda(memory) else "gloo"


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _open_store(host: str) -> TCPStore:
    """On a free port of `host` only: by itself a store listens on all addresses."""
    try:
        family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.bind(address)
            listener.listen()
            port = listener.getsockname()[1]
            return TCPStore(
                host,
                port,
                is_master=True,
                timeout=_STORE_TIMEOUT,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
    except (OSError, RuntimeError) as error:
        raise TransferError(f"no port of {host} for peers to meet us at: {error}") from error


def _join_store(host: str, port: int) -> TCPStore:
    return TCPStore(host, port, is_master=False, timeout=_STORE_TIMEOUT, wait_for_workers=False)
