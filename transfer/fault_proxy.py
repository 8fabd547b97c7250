"""A TCP proxy that does to connections what networks do: for tests, and to try a deployment out by hand.

It stands between any two that talk over TCP (router and worker, decode and prefill worker, client and router)
and can be told, while connections are up, to

    delay       every byte by so many seconds, in order
    limit       the bytes per second
    partition   pass nothing, in one direction or both; what is sent is held, the end of a connection too, so
                that nobody can tell a dead peer from a slow one. New connections are taken and held.
    reset       end all connections with RST
    half_open   let one side believe in connections whose other side is gone (a peer that lost its power)
    cut_after   end a connection with RST right behind the n-th byte from now
    refuse      take no new connections: whoever dials gets ECONNREFUSED

A TCP stream has no messages that could be doubled, reordered or lost one by one, so there are no such faults
here: the kernel would mend the stream or end it. Messages are lost, doubled and reordered in the property
tests of the hand-off (tests/transfer/test_handoff_schedules.py).

By hand: `python -m transfer.fault_proxy --to HOST:PORT`, and then the words above on standard input, as in
`delay 0.05`, `partition back`, `heal`, `limit 1000000`, `limit none`, `half_open dialler`, `cut_after 100
out`, `refuse`, `accept`. It ends with its standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import threading
from dataclasses import dataclass
from enum import Enum

from transfer.fault_connection import Connection, Rules, Side


class Direction(Enum):
    """As whoever dialled the proxy sees it."""

    OUT = "out"  # from the dialler to the target
    BACK = "back"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class ProxyStatistics:
    """accepted: connections so far. open: those of now. bytes_out, bytes_back: passed on so far."""

    accepted: int
    open: int
    bytes_out: int
    bytes_back: int


class FaultProxy:
    """Passes connections to `listen` on to `to`; both are "host:port", and port 0 lets the system choose.

    Used between `start` and `stop`, or in `async with`. All methods belong to one event loop and take effect
    at once, also on bytes that are under way.
    """

    def __init__(self, to: str, listen: str = "127.0.0.1:0") -> None:
        """to: may be changed at any time; connections that are up stay where they are."""
        self.to = to
        self.address = listen
        self._rules = {Direction.OUT: Rules(), Direction.BACK: Rules()}
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], Connection] = {}
        self._accepted = 0

    async def start(self) -> str:
        """Listens; returns the address, with the real port. After `refuse`: listens there again.

        Raises OSError.
        """
        if self._server is None:
            host, port = _host_port(self.address)
            self._server = await asyncio.start_server(self._take, host, port)
            bound = self._server.sockets[0].getsockname()[1]
            self.address = f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"
        return self.address

    async def stop(self) -> None:
        """Ends everything. Repeatable."""
        self.refuse()
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def __aenter__(self) -> FaultProxy:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def statistics(self) -> ProxyStatistics:
        out, back = self._rules[Direction.OUT].passed, self._rules[Direction.BACK].passed
        return ProxyStatistics(self._accepted, len(self._connections), out, back)

    def delay(self, seconds: float, direction: Direction = Direction.BOTH) -> None:
        """Bytes are passed on so long after they came; 0 is at once."""
        for rules in self._of(direction):
            rules.delay_s = seconds
            rules.change()

    def limit(self, bytes_per_s: float | None, direction: Direction = Direction.BOTH) -> None:
        """Of each direction of each connection; None is no limit."""
        for rules in self._of(direction):
            rules.bytes_per_s = bytes_per_s
            rules.change()

    def partition(self, direction: Direction = Direction.BOTH) -> None:
        """Holds all bytes and all ends of connections until `heal`."""
        for rules in self._of(direction):
            rules.held = True
            rules.change()

    def heal(self, direction: Direction = Direction.BOTH) -> None:
        """Ends a partition: what was held is delivered."""
        for rules in self._of(direction):
            rules.held = False
            rules.change()

    def cut_after(self, num_bytes: int, direction: Direction) -> None:
        """Once in each direction named: so many bytes pass, then the connection of the last one is reset."""
        for rules in self._of(direction):
            rules.cut_in = max(1, num_bytes)

    def reset(self) -> int:
        """Ends all connections, on both sides, with RST; returns how many there were."""
        for connection in self._connections.values():
            connection.reset(*Side)
        return len(self._connections)

    def half_open(self, survivor: Side) -> None:
        """Ends all connections on the other side only: what the survivor sends on them from now on vanishes,
        and nothing comes."""
        for connection in self._connections.values():
            connection.survivor = survivor
            connection.reset(*(side for side in Side if side is not survivor))

    def refuse(self) -> None:
        """Stops listening; connections that are up stay."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _of(self, direction: Direction) -> list[Rules]:
        return [rules for each, rules in self._rules.items() if direction in (each, Direction.BOTH)]

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._accepted += 1
        connection = Connection(reader, writer)
        self._connections[asyncio.create_task(self._serve(connection))] = connection

    async def _serve(self, connection: Connection) -> None:
        try:
            await connection.run(*_host_port(self.to), *self._rules.values())
            connection.close()
        except* OSError:
            pass  # one side broke or could not be reached: the other hears of it now
        finally:
            connection.reset(*Side)
            task = asyncio.current_task()
            assert task is not None
            del self._connections[task]


async def obey(proxy: FaultProxy, line: str) -> str:
    """Carries out one line of the command's input; returns what to print.

    Raises ValueError with the remedy, OSError if `accept` cannot listen.
    """
    word, *values = line.split()
    try:
        match word, values:
            case "delay", [seconds, *where]:
                proxy.delay(float(seconds), _direction(where))
            case "limit", [rate, *where]:
                proxy.limit(None if rate == "none" else float(rate), _direction(where))
            case "partition", where:
                proxy.partition(_direction(where))
            case "heal", where:
                proxy.heal(_direction(where))
            case "cut_after", [num_bytes, where]:
                proxy.cut_after(int(num_bytes), Direction(where))
            case "half_open", [survivor]:
                proxy.half_open(Side(survivor))
            case "reset", []:
                return f"reset {proxy.reset()} connections"
            case "refuse", []:
                proxy.refuse()
            case "accept", []:
                await proxy.start()
            case "show", []:
                pass
            case _:
                raise ValueError("no such word, or not so many values")
    except ValueError as error:
        raise ValueError(
            f"{line.strip()!r}: {error}; say delay SECONDS [WHERE], limit BYTES_PER_S|none [WHERE], "
            "partition [WHERE], heal [WHERE], cut_after BYTES WHERE, half_open dialler|target, reset, "
            "refuse, accept or show, with WHERE out, back or both"
        ) from error
    return str(proxy.statistics())


def _direction(where: list[str]) -> Direction:
    return Direction(" ".join(where) or "both")


def _host_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit():
        raise ValueError(f"{address!r} is not an address: write HOST:PORT, as in 127.0.0.1:9000")
    return host.strip("[]"), int(port)


async def _run(proxy: FaultProxy) -> None:
    lines: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def read() -> None:
        # A thread that nothing waits for: standard input may be anything, also what epoll does not take.
        with contextlib.suppress(RuntimeError):  # the loop is closed
            for line in iter(sys.stdin.readline, ""):
                loop.call_soon_threadsafe(lines.put_nowait, line)
            loop.call_soon_threadsafe(lines.put_nowait, "")

    async with proxy:
        print(f"{proxy.address} -> {proxy.to}", flush=True)
        threading.Thread(target=read, daemon=True).start()
        while line := await lines.get():
            try:
                if line.strip():
                    print(await obey(proxy, line), flush=True)
            except (ValueError, OSError) as error:
                print(error, file=sys.stderr, flush=True)


def main() -> None:
    """Entry of `python -m transfer.fault_proxy`."""
    parser = argparse.ArgumentParser(prog="python -m transfer.fault_proxy", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="port 0: a free one")
    parser.add_argument("--to", required=True, metavar="HOST:PORT", help="where connections go on to")
    arguments = parser.parse_args()
    try:
        _host_port(arguments.to)
        asyncio.run(_run(FaultProxy(arguments.to, arguments.listen)))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
