"""The fault proxy on real sockets."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from transfer.fault_proxy import Direction, FaultProxy, Side, obey

LIMIT_S = 20.0


@dataclass
class Wire:
    """A dialler's socket, and the target's end of the same connection."""

    near: socket.socket
    far: socket.socket

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.near, data)

    async def answer(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.far, data)


async def received(end: socket.socket, num_bytes: int) -> bytes:
    """So many bytes, or fewer if the stream ends. Raises ConnectionResetError."""
    data = b""
    async with asyncio.timeout(LIMIT_S):
        while len(data) < num_bytes:
            more = await asyncio.get_running_loop().sock_recv(end, num_bytes - len(data))
            if not more:
                break
            data += more
    return data


@dataclass
class Bench:
    proxy: FaultProxy
    target: socket.socket
    sockets: list[socket.socket] = field(default_factory=list)

    async def dial(self) -> socket.socket:
        near = socket.socket()
        near.setblocking(False)
        self.sockets.append(near)
        host, _, port = self.proxy.address.rpartition(":")
        await asyncio.get_running_loop().sock_connect(near, (host, int(port)))
        return near

    async def accept(self) -> socket.socket:
        async with asyncio.timeout(LIMIT_S):
            far, _ = await asyncio.get_running_loop().sock_accept(self.target)
        self.sockets.append(far)
        return far

    async def wire(self) -> Wire:
        return Wire(await self.dial(), await self.accept())

    async def nothing_for(self, end: socket.socket) -> None:
        """Nothing has come to `end`, though the proxy and the kernel had their turns."""
        for _ in range(20):
            await asyncio.sleep(0.001)
        with pytest.raises(BlockingIOError):
            end.recv(1)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    with socket.create_server(("127.0.0.1", 0)) as target:
        target.setblocking(False)
        proxy = FaultProxy(f"127.0.0.1:{target.getsockname()[1]}")
        async with proxy:
            bench = Bench(proxy, target)
            yield bench
        for each in bench.sockets:
            each.close()
    assert proxy.statistics().open == 0


async def test_without_faults_bytes_and_ends_pass_both_ways(bench: Bench) -> None:
    wire = await bench.wire()
    data = bytes(range(256)) * 4096
    sending = asyncio.create_task(wire.send(data))
    assert await received(wire.far, len(data)) == data
    await sending
    await wire.answer(b"answer")
    assert await received(wire.near, 6) == b"answer"
    wire.near.shutdown(socket.SHUT_WR)
    assert await received(wire.far, 1) == b""
    await wire.answer(b"more")  # one direction has ended, the other goes on
    wire.far.shutdown(socket.SHUT_WR)
    assert await received(wire.near, 5) == b"more"
    seen = bench.proxy.statistics()
    assert (seen.accepted, seen.bytes_out, seen.bytes_back) == (1, len(data), 10)


async def test_a_delay_is_of_one_direction_and_may_change_under_way(bench: Bench) -> None:
    slow = await bench.wire()
    loop = asyncio.get_running_loop()
    bench.proxy.delay(0.2, Direction.OUT)
    began = loop.time()
    await slow.send(b"first")
    await slow.answer(b"back")
    assert await received(slow.near, 4) == b"back"  # the other direction is as fast as ever
    await bench.nothing_for(slow.far)
    assert await received(slow.far, 5) == b"first"
    assert loop.time() - began >= 0.2
    await slow.send(b"held")
    bench.proxy.delay(1000.0)
    bench.proxy.delay(0.0)  # also for what is under way
    assert await received(slow.far, 4) == b"held"


async def test_a_limit_spreads_bytes_over_time(bench: Bench) -> None:
    wire = await bench.wire()
    loop = asyncio.get_running_loop()
    bench.proxy.limit(100_000.0, Direction.OUT)
    began = loop.time()
    await wire.send(bytes(20_000))
    assert len(await received(wire.far, 20_000)) == 20_000
    assert loop.time() - began >= 0.17  # the last piece is there when it is sent
    bench.proxy.limit(1.0, Direction.OUT)
    await wire.send(bytes(5000))
    await bench.nothing_for(wire.near)
    bench.proxy.limit(None)
    assert len(await received(wire.far, 5000)) == 5000


@pytest.mark.parametrize("direction", list(Direction))
async def test_a_partition_holds_bytes_and_ends_until_it_heals(bench: Bench, direction: Direction) -> None:
    wire = await bench.wire()
    bench.proxy.partition(direction)
    await wire.send(b"out")
    await wire.answer(b"back")
    for held, end, data in (
        (direction is not Direction.BACK, wire.far, b"out"),
        (direction is not Direction.OUT, wire.near, b"back"),
    ):
        if held:
            await bench.nothing_for(end)
        else:
            assert await received(end, len(data)) == data
    wire.near.shutdown(socket.SHUT_WR)
    wire.far.shutdown(socket.SHUT_WR)
    if direction is not Direction.BACK:
        await bench.nothing_for(wire.far)
    bench.proxy.heal()
    for held, end, data in (
        (direction is not Direction.BACK, wire.far, b"out"),
        (direction is not Direction.OUT, wire.near, b"back"),
    ):
        assert await received(end, 100) == (data if held else b"")


async def test_a_partition_holds_the_news_of_a_death(bench: Bench) -> None:
    wire = await bench.wire()
    bench.proxy.partition()
    wire.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    wire.far.close()
    await bench.nothing_for(wire.near)
    bench.proxy.heal()
    with pytest.raises(ConnectionResetError):
        await received(wire.near, 1)


async def test_a_partition_takes_new_connections_and_holds_them(bench: Bench) -> None:
    bench.proxy.partition()
    near = await bench.dial()
    await asyncio.get_running_loop().sock_sendall(near, b"hello")
    await bench.nothing_for(near)
    with pytest.raises(BlockingIOError):
        bench.target.accept()
    bench.proxy.heal()
    assert await received(await bench.accept(), 5) == b"hello"


async def test_reset_ends_connections_on_both_sides(bench: Bench) -> None:
    wires = [await bench.wire() for _ in range(2)]
    assert bench.proxy.reset() == 2
    for wire in wires:
        for end in (wire.near, wire.far):
            with pytest.raises(ConnectionResetError):
                await received(end, 1)
    healthy = await bench.wire()
    await healthy.send(b"again")
    assert await received(healthy.far, 5) == b"again"


@pytest.mark.parametrize("survivor", list(Side))
async def test_half_open_leaves_one_side_in_the_dark(bench: Bench, survivor: Side) -> None:
    wire = await bench.wire()
    bench.proxy.half_open(survivor)
    alive, gone = (wire.near, wire.far) if survivor is Side.DIALLER else (wire.far, wire.near)
    with pytest.raises(ConnectionResetError):
        await received(gone, 1)
    loop = asyncio.get_running_loop()
    for _ in range(10):  # more than one write: a connection that was reset takes one
        await loop.sock_sendall(alive, b"anybody there?")
        await bench.nothing_for(alive)
    assert bench.proxy.statistics().open == 1
    alive.close()
    async with asyncio.timeout(LIMIT_S):
        while bench.proxy.statistics().open:  # noqa: ASYNC110
            await asyncio.sleep(0)


@pytest.mark.parametrize("direction", [Direction.OUT, Direction.BACK])
async def test_cut_after_passes_so_many_bytes_and_no_more(bench: Bench, direction: Direction) -> None:
    wire, other = await bench.wire(), await bench.wire()
    bench.proxy.cut_after(1000, direction)
    source, sink = (wire.near, wire.far) if direction is Direction.OUT else (wire.far, wire.near)
    await asyncio.get_running_loop().sock_sendall(source, bytes(3000))
    assert len(await received(sink, 1000)) == 1000
    for end in (sink, source):
        with pytest.raises(ConnectionResetError):
            await received(end, 1)
    await other.send(bytes(3000))
    assert len(await received(other.far, 3000)) == 3000


async def test_refuse_takes_no_new_connections_and_start_does_again(bench: Bench) -> None:
    wire, address = await bench.wire(), bench.proxy.address
    bench.proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        await bench.dial()
    await wire.send(b"still")
    assert await received(wire.far, 5) == b"still"
    assert await bench.proxy.start() == address
    await bench.wire()


async def test_a_target_that_is_not_there_ends_the_connection(bench: Bench) -> None:
    bench.target.close()
    with pytest.raises(ConnectionResetError):
        await received(await bench.dial(), 1)


async def test_a_sender_is_not_read_for_ever(bench: Bench) -> None:
    wire = await bench.wire()
    bench.proxy.partition()
    # Until the proxy has its fill the kernel takes what it can; what it will not take is the fault's effect.
    sent = turns_without = 0
    while turns_without < 50 and sent < 200 * 2**20:
        await asyncio.sleep(0.001)
        try:
            sent += wire.near.send(bytes(2**20))
            turns_without = 0
        except BlockingIOError:
            turns_without += 1
    assert 2**20 <= sent < 100 * 2**20


async def test_words_do_what_they_say(bench: Bench) -> None:
    wire = await bench.wire()
    await obey(bench.proxy, "partition out")
    await wire.send(b"x")
    await wire.answer(b"y")
    assert await received(wire.near, 1) == b"y"
    await bench.nothing_for(wire.far)
    await obey(bench.proxy, "heal")
    assert await received(wire.far, 1) == b"x"
    assert "accepted=1" in await obey(bench.proxy, "show")
    await obey(bench.proxy, "refuse")
    with pytest.raises(ConnectionRefusedError):
        await bench.dial()
    await obey(bench.proxy, "accept")
    assert await obey(bench.proxy, "reset") == "reset 1 connections"
    for line in ("delay soon", "partition left", "cut_after 3", "explode", "limit"):
        with pytest.raises(ValueError, match="cut_after BYTES WHERE"):
            await obey(bench.proxy, line)


def test_the_command() -> None:
    with socket.create_server(("127.0.0.1", 0)) as target:
        command = [sys.executable, "-m", "transfer.fault_proxy", "--to"]
        done = subprocess.run(
            [*command, f"127.0.0.1:{target.getsockname()[1]}"],
            input="delay 0.1 back\nnonsense\nshow\n", capture_output=True, text=True, check=True,
        )  # fmt: skip
        wrong = subprocess.run([*command, "nowhere"], input="", capture_output=True, text=True)
    first, *answers = done.stdout.splitlines()
    assert first.startswith("127.0.0.1:")
    assert len(answers) == 2
    assert "nonsense" in done.stderr
    assert wrong.returncode == 2
    assert "HOST:PORT" in wrong.stderr
