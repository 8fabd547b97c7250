"""`prelay bench change`: the command line of a change under load."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench.cli_parts import milliseconds, need_matplotlib, progress, raise_file_limit
from cluster.cli_options import admin_option
from cluster.workload.errors import BadInputError
from cluster.workload.jobs import TIMEOUT_S
from cluster.workload.slo import DEFAULT

_EXIT_CODES = """
\b
Exit codes:
  0  done, whatever the figures are
  1  nothing at the URL can be measured, no request can meet the limits, or a command failed
  2  the command line, the trace or the dataset is wrong
"""

# What `prelay bench serve` can be told besides.
_REST: dict[str, Any] = {
    "rates": None, "requests": None, "arrivals": None, "seeds": 1, "warmup": 0.0, "time_scale": None,
    "timeout": TIMEOUT_S, "no_send_slo": False, "vocab_size": None, "devices": None,
}  # fmt: skip


@click.command(epilog=_EXIT_CODES)
@click.option(
    "--url", required=True, metavar="URL", help="http://HOST:PORT or grpc://HOST:PORT of the router."
)
@admin_option
@click.option("--tls", type=Path, metavar="DIR", help="Certificates, if the admin port has TLS.")
@click.option(
    "--at",
    "changes",
    multiple=True,
    required=True,
    metavar="SECONDS:COMMAND",
    help="What to do when, as in '20:role decode-0 mixed'. May be repeated.",
)
@click.option("--dataset", metavar="NAME:...", help="As of `prelay bench serve`.")
@click.option("--trace", type=Path, metavar="FILE", help="As of `prelay bench serve`.")
@click.option("--rate", type=float, metavar="R", help="Requests per second.")
@click.option("--duration", type=float, default=60.0, show_default=True, metavar="S", help="Of the load.")
@click.option(
    "--slo",
    "slo_text",
    default=DEFAULT,
    show_default=True,
    metavar="LIMITS",
    help="As of `prelay bench serve`.",
)
@click.option(
    "--length-scale", type=float, default=1.0, show_default=True, metavar="F", help="Of all lengths."
)
@click.option("--max-tokens", type=click.IntRange(2), metavar="N", help="Leave out rows with more.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option("--plot", type=Path, metavar="FILE", help="Draw the result into a PNG.")
def change(as_json: bool, plot: Path | None, **chosen: Any) -> int:
    """What clients see of a change: load on a running deployment, and `prelay role`, `scale`, ... meanwhile.

    Requests come as an open loop, whatever happens to the deployment, and are judged as by `prelay bench
    serve`. Commands are given one after the other, each when its time has come and the one before it is done.

    \b
    Examples:
      prelay bench change --url http://127.0.0.1:8000 --dataset synthetic:prompt=60,answer=40 --rate 5 \\
          --at '20:role decode-0 mixed' --at '40:role decode-0 decode' --plot change.png
      prelay bench change --url grpc://127.0.0.1:8001 --dataset synthetic:prompt=60,answer=40 --rate 5 \\
          --duration 90 --at 20:upgrade
    """
    from bench.change import Change, measure_change
    from bench.load.connect import check_url, connect
    from bench.load.options import plan_of, source_of

    try:
        plan = plan_of({**_REST, **chosen})
        check_url(chosen["url"])
        changes = sorted(map(Change.parse, chosen["changes"]), key=lambda one: one.at_s)
        late = [one for one in changes if one.at_s >= chosen["duration"]]
        if late:
            raise BadInputError(
                f"--at {late[0].at_s:g}: the load ends after --duration {chosen['duration']:g}"
            )
    except BadInputError as error:
        raise click.UsageError(str(error)) from error
    need_matplotlib(plot)
    raise_file_limit()
    console = Console(stderr=True)

    async def measured() -> Any:
        with progress("bench change") as show:
            async with connect(chosen["url"]) as target:
                return await measure_change(
                    target, plan, changes, chosen["admin"], chosen["tls"], show,
                    lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
                )  # fmt: skip

    try:
        changed = asyncio.run(measured())
    except BadInputError as error:
        raise click.UsageError(str(error)) from error
    result = {"url": chosen["url"], "dataset": source_of(chosen), "rate": chosen["rate"], **changed.to_json()}
    if plot is not None:
        from bench.change_plot import draw_change

        limits = f"TTFT <= {changed.slo.ttft}, TPOT <= {changed.slo.tpot}"
        draw_change(changed, f"{source_of(chosen)}, {chosen['rate']:g} requests/s, {limits}", plot)
    if as_json:
        click.echo(json.dumps(result))
        return 0
    table = Table(
        "arrived", "requests", "good", "goodput", "TTFT ms, p50 / p90 / p99", "TPOT ms", "other than good"
    )
    for name, found in result["phases"].items():
        missed = {key: count for key, count in found["outcomes"].items() if count and key != "good"}
        table.add_row(
            name, str(found["requests"]), f"{found['attainment']:.1%}", f"{found['goodput']:.2f}/s",
            milliseconds(found["ttft_s"]), milliseconds(found["tpot_s"]),
            ", ".join(f"{count} {key}" for key, count in missed.items()),
        )  # fmt: skip
    Console().print(table)
    return 0
