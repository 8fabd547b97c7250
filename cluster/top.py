"""`prelay top`: the status of a router on the whole terminal, again and again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn, Protocol

from prelay.v1 import admin_pb2
from rich.console import Console, RenderableType
from rich.live import Live

from cluster.errors import NoRouterError
from cluster.status import StatusClient
from cluster.status_view import status_view, waiting_view
from cluster.status_window import StatusWindow
from engine.tls import Identity

WINDOW_S = 30.0
"""Long enough to see an attainment that does not jump, short enough to see what has just changed."""


class Asks(Protocol):
    """A StatusClient."""

    def fetch(self) -> admin_pb2.GetStatusResponse: ...


def top(address: str, interval_s: float, console: Console, identity: Identity | None = None) -> None:
    """Draw until KeyboardInterrupt; what was on the terminal before is there again then. Where nothing can
    be drawn in place, one status is printed. Raises NoRouterError only then."""
    with StatusClient(address, identity) as client:
        if not console.is_terminal or console.is_dumb_terminal:
            console.print(status_view(client.fetch(), None, address))
            return
        with Live(console=console, screen=True, auto_refresh=False) as live:
            watch(client, address, interval_s, lambda view: live.update(view, refresh=True))


def watch(
    client: Asks,
    address: str,
    interval_s: float,
    draw: Callable[[RenderableType], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> NoReturn:
    """Ask and draw every `interval_s`, whether there is a router or not."""
    window = StatusWindow(WINDOW_S)
    while True:
        begin = clock()
        try:
            status = client.fetch()
        except NoRouterError as error:
            draw(waiting_view(str(error), interval_s))
        else:
            draw(status_view(status, window.add(begin, status), address))
        sleep(max(0.0, interval_s - (clock() - begin)))
