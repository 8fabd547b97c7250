"""How fast KV moves from one process to another, beside what the machine allows.

Two processes on a core each: the offerer has KV and serves it, the puller copies blocks of it into its own,
through a backend as a decode worker does: timed is Pull.pull, which ends with the generations being
checked. Beside every pull the puller copies as many bytes in the best way that there is without a backend:

    ipc         one memcpy of bytes in shared memory into its KV
    the others  a plain TCP stream over loopback, from the offerer's KV into the puller's

All memory is touched before, and each copy takes the next bytes of a pool that no cache holds, so that none
finds there what the one before it brought.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from prelay.v1 import transfer_pb2

from bench.processes import Remote
from bench.timing import Spread, seconds_of
from transfer.backends import make_backends
from transfer.base import KvMemory, Pull
from transfer.host_id import host_id
from transfer.ipc import SharedSegment
from transfer.layout import Part, Route, WorkerLayout

HOST = "127.0.0.1"
_EPOCH = 1
_LINK = 1
_REQUEST = struct.Struct("<QQ")
_ROUND_NBYTES = 16 << 20
"""Small copies are repeated in a round until they come to this many bytes."""
_MAX_REPEATS = 8


@dataclass(frozen=True, slots=True)
class Case:
    """One size. seconds of each round's copies, the middle ones: a pull of blocks that follow each other, of
    blocks in no order on either side, and the machine's own copy."""

    pull_s: float
    scattered_s: float
    limit_s: float


def measure_pulls(
    backend: str,
    source: WorkerLayout,
    target: WorkerLayout,
    num_blocks: Sequence[int],
    rounds: int,
    cores: tuple[int, int],
    on_round: Callable[[int], None],
) -> list[list[Case]]:
    """[rounds][sizes]; a round before them warms up.

    source, target: of offerer and puller, with blocks of the same size. num_blocks: of each size. cores: of
    offerer and puller. on_round: told which round comes.
    """
    pool = 3 * max(num_blocks)
    offerer = Remote("offerer", cores[0], serve_offerer, backend, source, pool)
    puller = Remote("puller", cores[1], serve_puller, backend, source, target, pool)
    try:
        port = offerer.take()
        answer = offerer.ask(puller.take())
        puller.ask((answer, port))
        found: list[list[Case]] = []
        for number in range(rounds + 1):
            on_round(number)
            found.append([puller.ask(count) for count in num_blocks])
        return found[1:]
    finally:
        puller.stop()
        offerer.stop()


def serve_offerer(connection: Connection, backend: str, layout: WorkerLayout, num_blocks: int) -> None:
    """In a process: sends its port for plain streams, then answers handshakes."""
    torch.set_num_threads(1)
    segments, memory = _kv(layout, num_blocks)
    [offering] = make_backends(backend, memory, segments, HOST, f"offerer-{os.getpid()}")
    listener = socket.create_server((HOST, 0))
    threading.Thread(target=_send_plainly, args=(listener, segments[0].data_buffer), daemon=True).start()
    connection.send(listener.getsockname()[1])
    while (handshake := connection.recv()) is not None:
        answer = transfer_pb2.Handshake(worker_id="offerer", epoch=_EPOCH, host_id=host_id())
        offering.offer(_LINK, transfer_pb2.Handshake.FromString(handshake), answer)
        connection.send(answer.SerializeToString())
    offering.close()


def serve_puller(
    connection: Connection, backend: str, source: WorkerLayout, target: WorkerLayout, num_blocks: int
) -> None:
    """In a process: sends its handshake, takes the offerer's answer and port, then measures."""
    torch.set_num_threads(1)
    segments, memory = _kv(target, num_blocks)
    [pulling] = make_backends(backend, memory, segments, HOST, f"puller-{os.getpid()}")
    connection.send(
        transfer_pb2.Handshake(worker_id="puller", epoch=_EPOCH, host_id=host_id()).SerializeToString()
    )
    answer, port = connection.recv()
    route = Route(source, target)
    pull = pulling.connect(transfer_pb2.Handshake.FromString(answer), route)
    limit = _Memcpy(segments[0], target, num_blocks) if backend == "ipc" else _PlainStream(port, segments[0])
    measured = _Puller(pull, route, limit, num_blocks)
    connection.send(None)
    while (count := connection.recv()) is not None:
        connection.send(measured.case(count))
    pull.close()
    pulling.close()


class _Puller:
    """Times pulls and copies by turns."""

    def __init__(self, pull: Pull, route: Route, limit: _Memcpy | _PlainStream, num_blocks: int) -> None:
        self._pull = pull
        self._route = route
        self._limit = limit
        self._num_blocks = num_blocks
        self._next = 0
        self._random = random.Random(0)

    def case(self, count: int) -> Case:
        """Of `count` blocks."""
        nbytes = count * self._limit.block_nbytes
        repeats = max(1, min(_MAX_REPEATS, _ROUND_NBYTES // nbytes))
        limits, pulls, scattered = [], [], []
        for _ in range(repeats):
            first = self._take(count)
            limits.append(seconds_of(lambda: self._limit.copy(first, count)))  # noqa: B023
            first = self._take(count)
            pulls.append(self._seconds(range(first, first + count), range(first, first + count)))
            first = self._take(2 * count)
            ours, theirs = (self._random.sample(range(first, first + 2 * count), count) for _ in range(2))
            scattered.append(self._seconds(theirs, ours))
        return Case(_middle(pulls), _middle(scattered), _middle(limits))

    def _seconds(self, theirs: Sequence[int], ours: Sequence[int]) -> float:
        end = len(theirs) * self._route.source.block_size
        part = Part(0, end, 0, self._route.source.num_layers, tuple(theirs), (0,) * len(theirs))
        boxes = self._route.boxes(part, ours)
        return seconds_of(lambda: self._pull.pull(part, boxes))

    def _take(self, count: int) -> int:
        """The first of the next blocks."""
        first = self._next if self._next + count <= self._num_blocks else 0
        self._next = first + count
        return first


class _Memcpy:
    """Copies from other shared memory into ours."""

    def __init__(self, ours: SharedSegment, layout: WorkerLayout, num_blocks: int) -> None:
        self.block_nbytes = ours.blocks.shape[1]
        self._ours = ours.blocks
        self._theirs = SharedSegment.create(layout.rank(0), num_blocks, _EPOCH).blocks
        self._theirs.random_()

    def copy(self, first: int, count: int) -> None:
        self._ours[first : first + count].copy_(self._theirs[first : first + count])


class _PlainStream:
    """Asks the offerer for bytes, and receives them."""

    def __init__(self, port: int, ours: SharedSegment) -> None:
        self.block_nbytes = ours.blocks.shape[1]
        self._ours = ours.data_buffer
        self._socket = socket.create_connection((HOST, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def copy(self, first: int, count: int) -> None:
        start, end = first * self.block_nbytes, (first + count) * self.block_nbytes
        self._socket.sendall(_REQUEST.pack(start, end - start))
        while start < end:
            start += self._socket.recv_into(self._ours[start:end])


def _send_plainly(listener: socket.socket, data: memoryview) -> None:
    """What _PlainStream asks for, until it goes."""
    stream, _ = listener.accept()
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while request := stream.recv(_REQUEST.size, socket.MSG_WAITALL):
        start, nbytes = _REQUEST.unpack(request)
        start %= len(data) - nbytes + 1  # a worker of several ranks has several such pieces
        stream.sendall(data[start : start + nbytes])


def _kv(layout: WorkerLayout, num_blocks: int) -> tuple[list[SharedSegment], KvMemory]:
    """Written all over: what nobody has written is the same page of zeros everywhere."""
    segments = [
        SharedSegment.create(layout.rank(rank), num_blocks, _EPOCH) for rank in range(layout.num_ranks)
    ]
    for segment in segments:
        segment.blocks.random_()
    return segments, KvMemory(layout, tuple(s.blocks for s in segments), segments[0].generations)


def _middle(values: Sequence[float]) -> float:
    return Spread.of(values).median
