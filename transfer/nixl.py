"""The backend `nixl`: the puller reads the peer's memory by itself, over whatever UCX finds between the two.

That is RDMA where both have a device for it, the kernel's copy between two processes on one host, and else
TCP. A worker has one agent, with which its KV and its generations are registered; a link costs the offerer
nothing but the message that says where they are.

Reads are whole runs of bytes, so their number does not depend on tokens and heads: the layers of a block are
read as they lie into a buffer, and what is wanted is copied from there (nixl_reads.py). The generations are
read last, so that a block that was recycled while it was read is found out.

The paths for CUDA memory have not been run yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from prelay.v1 import transfer_pb2

from transfer.base import KvMemory, check_generations
from transfer.errors import PeerMismatchError
from transfer.handoff import LinkId
from transfer.layout import Box, Part, Route
from transfer.nixl_agent import NixlAgent, Place
from transfer.nixl_reads import RemoteKv, plan_reads

CHUNK_NBYTES = 4 << 20
WINDOW = 4
"""Reads under way, each of at most CHUNK_NBYTES (or one block)."""

PATIENCE_S = 10.0

_FOUND = -1
"""Where NixlPull._registered has the generations; the buffers are at 0 and on."""


class NixlBackend:
    """Backend over NIXL.

    agent: name of this life of this worker, different from all others. patience_s: a peer that is connected
    and cannot be read is given up after it. Raises BackendMissingError.
    """

    name = "nixl"

    def __init__(self, memory: KvMemory, agent: str, patience_s: float = PATIENCE_S) -> None:
        self._memory = memory
        self._agent = NixlAgent(agent, patience_s)
        self._ranks = [Place.of(rank) for rank in memory.tensors]
        self._generations = Place.of(torch.from_numpy(memory.generations))
        self._registered = [self._agent.register(place) for place in (*self._ranks, self._generations)]
        # Taken before buffers are registered, which are nobody's business.
        self._metadata = self._agent.metadata()

    def reaches(self, theirs: transfer_pb2.Handshake) -> bool:
        return True

    def offer(self, link: LinkId, theirs: transfer_pb2.Handshake, answer: transfer_pb2.Handshake) -> None:
        answer.nixl.agent = self._agent.name
        answer.nixl.metadata = self._metadata
        answer.nixl.ranks.extend(_region(place) for place in self._ranks)
        answer.nixl.generations.CopyFrom(_region(self._generations))

    def end_offer(self, link: LinkId) -> None:
        """Who knows where our memory is may go on reading it: generations tell it what its copy is worth."""

    def connect(self, theirs: transfer_pb2.Handshake, route: Route) -> NixlPull:
        endpoint = theirs.nixl
        if len(endpoint.ranks) != route.source.num_ranks:
            raise PeerMismatchError(
                f"endpoint: {theirs.worker_id} has {route.source.num_ranks} ranks and shows the memory of "
                f"{len(endpoint.ranks)}"
            )
        source = RemoteKv(
            route.source, [_place(each) for each in endpoint.ranks], _place(endpoint.generations)
        )
        return NixlPull(self._agent, endpoint, source, self._memory)

    def close(self) -> None:
        for registered in self._registered:
            self._agent.deregister(registered)
        self._registered.clear()
        self._agent.close()


class NixlPull:
    """Reads the memory of one peer. Connects first; raises PeerUnreachableError."""

    def __init__(
        self, agent: NixlAgent, endpoint: transfer_pb2.NixlEndpoint, source: RemoteKv, memory: KvMemory
    ) -> None:
        self._agent = agent
        self._memory = memory
        self._source = source
        self._found = np.zeros(source.num_blocks, np.uint32)
        self._buffers = [memory.tensors[0].new_empty(0)] * WINDOW
        self._registered: dict[int, Any] = {}
        self._peer = agent.meet(endpoint.agent, endpoint.metadata)
        try:
            self._register(_FOUND, torch.from_numpy(self._found))
            self._read_generations(range(1))  # the first read takes a while
        except BaseException:
            self.close()
            raise

    def pull(self, part: Part, boxes: Sequence[Box]) -> None:
        reads = plan_reads(self._source, part, boxes, self._memory, CHUNK_NBYTES)
        under_way: deque[tuple[Any, Callable[[], None]]] = deque()
        try:
            for n, read in enumerate(reads):
                if len(under_way) == WINDOW:
                    self._finish_one(under_way)
                buffer = self._buffer(n % WINDOW, read.buffer_nbytes)
                handle = self._peer.start_read(read.ours(buffer), read.theirs)
                under_way.append((handle, partial(read.then, buffer)))
            while under_way:
                self._finish_one(under_way)
            if part.blocks:
                self._read_generations(range(min(part.blocks), max(part.blocks) + 1))
        except BaseException:
            self._give_up([handle for handle, _ in under_way])
            raise
        check_generations(part, self._found[list(part.blocks)])

    def close(self) -> None:
        self._peer.leave()
        for registered in self._registered.values():
            self._agent.deregister(registered)
        self._registered.clear()

    def _finish_one(self, under_way: deque[tuple[Any, Callable[[], None]]]) -> None:
        handle, then = under_way[0]
        self._peer.finish(handle)
        under_way.popleft()
        then()

    def _read_generations(self, blocks: range) -> None:
        ours = Place.of(torch.from_numpy(self._found[blocks.start : blocks.stop]))
        handle = self._peer.start_read([ours], [self._source.generations_of(blocks)])
        try:
            self._peer.finish(handle)
        except BaseException:
            self._give_up([handle])
            raise

    def _give_up(self, handles: Sequence[Any]) -> None:
        """The link is done for. What is under way may yet be written, so that memory stays as it is."""
        if self._peer.abandon(handles):
            self._agent.keep([self._found, *self._buffers])
            self._registered.clear()

    def _buffer(self, at: int, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], registered. Its last read is done."""
        if len(self._buffers[at]) < nbytes:
            if at in self._registered:
                self._agent.deregister(self._registered.pop(at))
            self._buffers[at] = self._buffers[at].new_zeros(max(nbytes, CHUNK_NBYTES))
            self._register(at, self._buffers[at])
        return self._buffers[at][:nbytes]

    def _register(self, at: int, tensor: torch.Tensor) -> None:
        self._registered[at] = self._agent.register(Place.of(tensor))


def _region(place: Place) -> transfer_pb2.NixlRegion:
    return transfer_pb2.NixlRegion(
        address=place.address, num_bytes=place.num_bytes, memory=place.memory, device=place.device
    )


def _place(region: transfer_pb2.NixlRegion) -> Place:
    return Place(region.address, region.num_bytes, region.memory, region.device)
