"""`prelay status` and `top`: commands that look at a running deployment."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from typing import TYPE_CHECKING

import click

from cluster.cli_options import admin_option, not_nan, tls_option

if TYPE_CHECKING:
    from engine.tls import Identity

_EXIT_CODES = """
\b
Exit codes:
  0  done
  1  no router answers
  2  the command line is wrong
"""


@click.command(epilog=_EXIT_CODES)
@admin_option
@tls_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def status(admin: str, tls: Identity | None, as_json: bool) -> int:
    """Show once what a running server does: workers, queues, KV use, attainment by SLO class, latencies.

    Counts and attainment are since the router started, TTFT and TPOT of the last 1,024 requests. With --json
    times are in seconds, and what is not known yet is null.

    \b
    Examples:
      prelay status
      prelay status --json | jq '.classes[].attainment'
    """
    from rich.console import Console

    from cluster.status import StatusClient, status_json
    from cluster.status_view import status_view

    with StatusClient(admin, tls) as client:
        found = client.fetch()
    if as_json:
        click.echo(json.dumps(status_json(found)))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(status_view(found, None, admin))
    return 0


@click.command(epilog=_EXIT_CODES)
@admin_option
@tls_option
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600.0),
    callback=not_nan,
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks.",
)
def top(admin: str, tls: Identity | None, interval: float) -> int:
    """Watch what a running server does, live on the terminal, until Ctrl-C.

    Shows what `prelay status` shows, and beside it rates and attainment of the last 30 seconds. While no
    router answers it says so and keeps trying. Where standard output is no terminal it prints one status.

    \b
    Examples:
      prelay top
      prelay top --admin 10.0.0.7:9091 --interval 5
    """
    from rich.console import Console

    from cluster.top import top as run_top

    # Ended otherwise than by Ctrl-C, too, it leaves the terminal as it was.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        run_top(admin, interval, Console(width=None if sys.stdout.isatty() else 120), tls)
    return 0


COMMANDS: tuple[click.Command, ...] = (status, top)
