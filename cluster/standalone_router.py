"""`prelay router`: one router by itself, outside of Ray, for a deployment that is told of it
(router.external)."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from dataclasses import asdict

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table

from cluster.config import ServeConfig
from cluster.reporter import reporter_for
from cluster.router_config import listening, router_settings
from cluster.router_process import RouterProcess


async def run_router(config: ServeConfig, *, as_json: bool, log_level: str) -> None:
    """config: resolved. Runs until SIGINT or SIGTERM. Raises AddressInUseError or RouterError, also when the
    router ends by itself."""
    loop, told_to_stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told_to_stop.set)
    reporter = reporter_for(Console(stderr=True))
    router = await RouterProcess.start(router_settings(config, log_level).to_json(), reporter.event)
    addresses = router.addresses
    if as_json:
        said = {"event": "ready", **asdict(addresses), "pid": router.pid, "model": config.model.name}
        print(json.dumps(said), flush=True)
    else:
        listeners = Table.grid(padding=(0, 2))
        for name, url, note in listening(config, addresses):
            listeners.add_row(f"[bold]{name}[/]", f"[cyan]{url}[/]", f"[dim]{note}[/]")
        note = (
            "It has workers as soon as a `prelay serve` names its admin port (router.external). Ctrl-C stops "
            "it."
        )
        title = f"prelay routes to [bold]{config.model.name}[/], policy [bold]{config.router.policy}[/]"
        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(
            Panel(Group(listeners, "", f"[dim]{note}[/]"), title=title, title_align="left", expand=False)
        )
    ending = asyncio.ensure_future(router.ended())
    stopping = asyncio.ensure_future(told_to_stop.wait())
    try:
        await asyncio.wait([ending, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            raise ending.result()
    finally:
        ending.cancel()
        stopping.cancel()
        await router.stop()
