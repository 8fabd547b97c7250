"""`prelay bench router`: its command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench.cli_parts import need_matplotlib, progress

_EXIT_CODES = """
\b
Exit codes:
  0  done, whatever the figures are
  1  the router did not start, ended, or refused what was sent
  2  the command line is wrong
"""


@click.command(epilog=_EXIT_CODES)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Times that everything is measured.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1),
    default=2.0,
    show_default=True,
    metavar="S",
    help="Of each measurement.",
)
@click.option(
    "--streams",
    type=click.IntRange(1, 1024),
    default=256,
    show_default=True,
    metavar="N",
    help="Streams that are open at once.",
)
@click.option(
    "--answer",
    "answer_tokens",
    type=click.IntRange(2, 2048),
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens of each answer.",
)
@click.option(
    "--workers",
    "workers_in_view",
    default="10,100,1000",
    show_default=True,
    metavar="N,N",
    help="In view of a decision.",
)
@click.option(
    "--decisions",
    type=click.IntRange(10),
    default=2000,
    show_default=True,
    metavar="N",
    help="Of each of these.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option("--plot", type=Path, metavar="FILE", help="Draw the result into a PNG.")
def router(plot: Path | None, as_json: bool, workers_in_view: str, **chosen: Any) -> int:
    """What one router process carries, and how fast it decides.

    A real router with the goodput policy on the first core; workers without engines and clients on the last
    one, all over real sockets. No model and no GPU is needed.

    \b
    requests/s  short prompts, answers of one token, over gRPC and over HTTP; the lower of the two
    tokens/s    streamed to many clients at once: the highest rate at which 97 % of what workers send arrives
    added       at half of that rate: from the sending of a token by its worker to its arrival at the client;
                of the two front ends the slower one
    decision    gate and placement of one request with so many busy workers in view, CPU time, p99

    Whoever falls behind gets several tokens in a piece, so the highest rate has more tokens a piece than half
    of it. Figures are medians of the rounds; --json has the spread, every point, and how much of their cores
    the router and the others used. A note says when the clients were the bottleneck.

    \b
    Examples:
      prelay bench router --json --plot router.png
      prelay bench router --rounds 1 --seconds 1 --streams 64
    """
    from bench.router import Settings, measure

    need_matplotlib(plot)
    if len(os.sched_getaffinity(0)) < 2:
        raise click.UsageError("two cores are needed, one for the router, one for the others; there is one")
    settings = Settings(workers_in_view=_numbers(workers_in_view), **chosen)
    with progress("bench router") as show:
        result = measure(settings, show)
    if plot is not None:
        from bench.router_plot import draw_router

        draw_router(result, plot)
    if as_json:
        click.echo(json.dumps(result))
        return 0
    Console().print(_table(result))
    for note in result["notes"]:
        click.echo(f"note: {note}", err=True)
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() and int(part) >= 2 for part in parts):
        raise click.UsageError(f"--workers {text!r}: numbers of at least 2 are needed, as in 10,100,1000")
    return tuple(int(part) for part in parts)


def _table(result: dict[str, Any]) -> Table:
    table = Table("", "median", "min - max", title="one router process, one core")

    def row(what: str, spread: dict[str, float], digits: int) -> None:
        low, middle, high = (f"{spread[key]:,.{digits}f}" for key in ("min", "median", "max"))
        table.add_row(what, middle, f"{low} - {high}")

    for name in result["tokens_s"]:
        row(f"{name}: requests/s", result["requests_s_spread"][name], 0)
        row(f"{name}: tokens/s", result["tokens_s_spread"][name], 0)
        for share in ("p50", "p99"):
            row(f"{name}: added at half of it, {share}, ms", result["added_ms_spread"][name][share], 2)
    for workers, times in result["decision_ms"].items():
        row(f"decision with {workers} workers, p99, ms", times["decision_p99"], 2)
        row(f"whole turn with {workers} workers, p99, ms", times["turn_p99"], 2)
    return table
