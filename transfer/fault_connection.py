"""One connection through the fault proxy, and the rules that its two directions follow.

Each direction is a pair of tasks with held bytes between them: one reads, one writes what may go on. The end
of a stream (FIN) and of a connection (RST) are held and delayed like bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

_CHUNK_BYTES = 64 * 1024
_MAX_HELD_BYTES = 4 * 2**20
"""In one direction of one connection; its sender is not read while more is held, so that its buffers fill."""

_PIECE_S = 0.02
"""A limited connection passes pieces of about this duration."""


class Side(Enum):
    """Who the two are between whom the proxy stands."""

    DIALLER = "dialler"
    TARGET = "target"


@dataclass(slots=True)
class Rules:
    """What happens in one direction, to all connections."""

    delay_s: float = 0.0
    bytes_per_s: float | None = None
    held: bool = False
    cut_in: int | None = None
    passed: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def change(self) -> None:
        """Wakes those who wait by what the rules were."""
        self.changed.set()
        self.changed = asyncio.Event()

    async def passes(self, arrived: float) -> None:
        """Waits until what arrived then may go on."""
        await self._until(lambda: math.inf if self.held else arrived + self.delay_s)

    async def sent(self, num_bytes: int) -> None:
        """Waits as long as so many bytes take."""
        begin = asyncio.get_running_loop().time()
        await self._until(lambda: begin + num_bytes / self.bytes_per_s if self.bytes_per_s else begin)

    def piece(self, num_bytes: int) -> int:
        """How many of so many bytes may go out together."""
        if self.bytes_per_s is not None:
            num_bytes = min(num_bytes, max(1, int(self.bytes_per_s * _PIECE_S)))
        return num_bytes if self.cut_in is None else min(num_bytes, self.cut_in)

    def count(self, num_bytes: int) -> None:
        """So many bytes were passed on. Raises ConnectionResetError if the connection is to be cut here."""
        self.passed += num_bytes
        if self.cut_in is not None:
            self.cut_in -= num_bytes
            if self.cut_in <= 0:
                self.cut_in = None
                raise ConnectionResetError("cut")

    async def _until(self, due: Callable[[], float]) -> None:
        """Waits for the loop's time `due()`, which may change with the rules."""
        now = asyncio.get_running_loop().time
        while (end := due()) > now():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(end):
                    await self.changed.wait()


class Connection:
    """One connection: in each direction bytes are read, held for as long as the rules say, and written.

    survivor: set once the connection is half open: the side that does not know.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.survivor: Side | None = None
        self._reader = reader
        self._writers = {Side.DIALLER: writer}
        self._gone: set[Side] = set()

    async def run(self, host: str, port: int, out: Rules, back: Rules) -> None:
        """Until both directions have ended; an OSError ends both, and one that cannot be dialled is one."""
        await out.passes(0.0)
        reader, self._writers[Side.TARGET] = await asyncio.open_connection(host, port)
        self.reset(*self._gone)  # while the target was dialled
        async with asyncio.TaskGroup() as group:
            for source, to, rules in ((self._reader, Side.TARGET, out), (reader, Side.DIALLER, back)):
                held = Held()
                group.create_task(self._read(source, held))
                group.create_task(self._write(held, to, rules))

    def close(self) -> None:
        """When both directions have ended."""
        for writer in self._writers.values():
            writer.close()

    def reset(self, *sides: Side) -> None:
        """RST instead of FIN; what is buffered is lost."""
        self._gone.update(sides)
        for side in sides:
            writer = self._writers.get(side)
            if writer is not None and not writer.transport.is_closing():
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()

    async def _read(self, source: asyncio.StreamReader, held: Held) -> None:
        now = asyncio.get_running_loop().time
        while True:
            try:
                data = await source.read(_CHUNK_BYTES)
            except OSError as error:  # the end by RST; it goes the way of all bytes
                await held.put(now(), error)
                return
            await held.put(now(), data)
            if not data:
                return

    async def _write(self, held: Held, to: Side, rules: Rules) -> None:
        writer = self._writers[to]
        # So that `drain` means: the kernel has it, and a cut behind it does not take it back.
        writer.transport.set_write_buffer_limits(0)
        while True:
            arrived, data = await held.take()
            await rules.passes(arrived)
            if isinstance(data, OSError) or not data:
                await self._end(to, data)
                return
            while data:
                size = rules.piece(len(data))
                await self._send(writer, data[:size])
                data = data[size:]
                rules.count(size)
                await rules.sent(size)
                await rules.passes(arrived)

    async def _send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        try:
            if self.survivor is None:
                writer.write(data)
                await writer.drain()
        except OSError:
            if self.survivor is None:
                raise

    async def _end(self, to: Side, end: OSError | bytes) -> None:
        """One side has ended its stream, or the connection."""
        if self.survivor is to:
            await asyncio.Event().wait()  # it hears nothing of this, until it ends or the proxy does
        if self.survivor is not None:
            raise ConnectionResetError("the survivor has left, too")
        if isinstance(end, OSError):
            raise end
        self._writers[to].write_eof()


class Held:
    """What came in one direction and has not gone on yet, with the loop's time at which it came.

    An empty piece is the end of the stream, an error that of the connection.
    """

    def __init__(self) -> None:
        self._pieces: deque[tuple[float, bytes | OSError]] = deque()
        self._num_bytes = 0
        self._news = asyncio.Condition()

    async def put(self, arrived: float, data: bytes | OSError) -> None:
        """Waits while there is too much."""
        async with self._news:
            await self._news.wait_for(lambda: self._num_bytes < _MAX_HELD_BYTES)
            self._pieces.append((arrived, data))
            self._num_bytes += len(data) if isinstance(data, bytes) else 0
            self._news.notify_all()

    async def take(self) -> tuple[float, bytes | OSError]:
        """Waits while there is nothing."""
        async with self._news:
            await self._news.wait_for(lambda: bool(self._pieces))
            arrived, data = self._pieces.popleft()
            self._num_bytes -= len(data) if isinstance(data, bytes) else 0
            self._news.notify_all()
            return arrived, data
