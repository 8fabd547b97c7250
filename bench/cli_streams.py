"""`prelay bench streams`: its command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench.cli_parts import need_matplotlib, progress, raise_file_limit

_EXIT_CODES = """
\b
Exit codes:
  0  done, whatever the figures are
  1  the router did not start, ended, or broke a stream
  2  the command line is wrong
"""


@click.command(epilog=_EXIT_CODES)
@click.option(
    "--streams",
    type=click.IntRange(2, 8192),
    default=5000,
    show_default=True,
    metavar="N",
    help="Open at once.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(1.0),
    default=600.0,
    show_default=True,
    metavar="S",
    help="Of the load.",
)
@click.option(
    "--answer",
    "answer_tokens",
    type=click.IntRange(2, 2048),
    default=128,
    show_default=True,
    metavar="N",
    help="Tokens of each answer.",
)
@click.option(
    "--tokens",
    "tokens_s",
    type=click.FloatRange(1.0),
    default=8000.0,
    show_default=True,
    metavar="R",
    help="Per second, of all streams together.",
)
@click.option(
    "--leaves",
    type=click.FloatRange(0.0, 1.0),
    default=0.3,
    show_default=True,
    metavar="P",
    help="Of the answers, how many lose their client at random before their end.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option("--plot", type=Path, metavar="FILE", help="Draw memory and latency over time into a PNG.")
def streams(plot: Path | None, as_json: bool, **chosen: Any) -> int:
    """Thousands of streams through one router for minutes, with clients that leave at random: what grows?

    A real router on the first core, workers without engines and clients on the last one, as in `prelay bench
    router`; half of the streams are gRPC's, half HTTP's. Shows the router's memory, how fast it grows once it
    has settled, what a token takes from its worker to its client, and how many requests are left when all
    have gone.

    \b
    Examples:
      prelay bench streams --json --plot streams.png
      prelay bench streams --streams 500 --seconds 30
    """
    from bench.streams import Settings, measure

    need_matplotlib(plot)
    if len(os.sched_getaffinity(0)) < 2:
        raise click.UsageError("two cores are needed, one for the router, one for the others; there is one")
    raise_file_limit()
    with progress("bench streams") as show:
        result = measure(Settings(**chosen), show)
    if plot is not None:
        from bench.streams_plot import draw_streams

        draw_streams(result, plot)
    if as_json:
        click.echo(json.dumps(result))
        return 0
    memory, added = result["memory_mb"], result["added_ms"]
    table = Table(
        "", "", show_header=False, title=f"{result['streams']} streams for {result['seconds']:.0f} s"
    )
    for name, value in (
        ("answers to the end / left by their clients", f"{result['answers']:,} / {result['left']:,}"),
        ("tokens/s", f"{result['tokens_s']:,.0f}"),
        (
            "router's memory before / most / after, MB",
            " / ".join(f"{memory[key]:.0f}" for key in ("before", "most", "after")),
        ),
        ("and its growth once settled, MB a minute", f"{memory['slope_per_min']:+.2f}"),
        (
            "a token's way, p50 / p99 / worst p99 of 10 s, ms",
            f"{added['p50']:.0f} / {added['p99']:.0f} / {added['p99_worst']:.0f}",
        ),
        ("router's share of its core", f"{result['router_cpu_share']:.0%}"),
        ("requests left behind", str(result["left_behind"])),
    ):
        table.add_row(name, value)
    Console().print(table)
    return 0
