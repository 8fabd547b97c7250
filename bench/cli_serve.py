"""`prelay bench serve`: the command line of the load generator."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from bench.cli_parts import milliseconds, need_directory, need_matplotlib, progress, raise_file_limit
from cluster.workload.errors import BadInputError
from cluster.workload.jobs import TIMEOUT_S
from cluster.workload.slo import DEFAULT

if TYPE_CHECKING:
    from bench.load.serve import Measured, ServePlan

_NUM_ERRORS = 3
_EXIT_CODES = """
\b
Exit codes:
  0  done, whatever the server's figures are
  1  nothing at the URL can be measured, or no request can meet the limits
  2  the command line, the trace or the dataset is wrong
"""


@click.command(epilog=_EXIT_CODES)
@click.option(
    "--url",
    required=True,
    metavar="URL",
    help="http://HOST:PORT (OpenAI-compatible) or grpc://HOST:PORT (prelay).",
)
@click.option(
    "--trace",
    type=Path,
    metavar="FILE",
    help="Azure CSV, Mooncake JSONL, length CSV, or arrival_s,prompt_tokens,output_tokens.",
)
@click.option(
    "--dataset",
    metavar="NAME:...",
    help="synthetic:prompt=512,answer=64 (or 128-1024), sharegpt:FILE, mix:FILE,FILE,period=60.",
)
@click.option("--rate", type=float, metavar="R", help="Requests per second.")
@click.option("--rates", metavar="A,B,C", help="Several rates, for the curve of attainment.")
@click.option(
    "--duration",
    type=float,
    metavar="S",
    help="Seconds that are judged at each rate (default 60).",
)
@click.option(
    "--requests", type=click.IntRange(1), metavar="N", help="Requests that are judged at each rate, instead."
)
@click.option(
    "--slo",
    "slo_text",
    default=DEFAULT,
    show_default=True,
    metavar="LIMITS",
    help="ttft=2,tpot=60ms, or multiples of what a request takes alone.",
)
@click.option(
    "--arrivals",
    metavar="PROCESS",
    help="poisson (default), gamma:CV, constant, trace (default without a rate).",
)
@click.option(
    "--seeds", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Runs at each rate."
)
@click.option(
    "--warmup",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    metavar="S",
    help="Seconds before what is judged.",
)
@click.option(
    "--time-scale", type=float, metavar="F", help="Seconds that a second of the trace takes, at its own pace."
)
@click.option(
    "--length-scale",
    type=float,
    default=1.0,
    show_default=True,
    metavar="F",
    help="Factor for prompts and answers.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(2),
    metavar="N",
    help="Leave out rows with more, prompt and answer together, after scaling.",
)
@click.option(
    "--timeout",
    type=float,
    default=TIMEOUT_S,
    show_default=True,
    metavar="S",
    help="Give a request up after it.",
)
@click.option("--no-send-slo", is_flag=True, help="Do not tell the server the limits.")
@click.option("--model", metavar="NAME", help="Which (default: the first that the server lists).")
@click.option(
    "--prompts",
    type=click.Choice(["auto", "ids", "text", "chat"]),
    default="auto",
    show_default=True,
    help="How prompts are sent over HTTP.",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(2),
    metavar="N",
    help="Token ids are below it (default: as the server says, else 1000).",
)
@click.option(
    "--header",
    "headers",
    multiple=True,
    metavar="NAME:VALUE",
    help="Sent with every request. May be repeated.",
)
@click.option(
    "--devices", type=click.IntRange(1), metavar="N", help="That the server holds, for goodput per device."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option("--plot", type=Path, metavar="FILE", help="Draw the result into a PNG.")
@click.option("--requests-out", type=Path, metavar="FILE", help="Write a CSV with a row for each request.")
def serve(as_json: bool, plot: Path | None, requests_out: Path | None, **chosen: Any) -> int:
    """Goodput of a server that runs: open loop, judged by TTFT and TPOT of each request.

    Arrivals do not wait for answers. A request is good if it is complete and meets both limits; refused,
    failed and given-up ones count against the server. The limits are sent to it, too (x-slo-ttft-ms and
    x-slo-tpot-ms, or fields of gRPC). First of all it is measured what requests take alone.

    \b
    Examples:
      prelay bench serve --url http://127.0.0.1:8000 --dataset synthetic:prompt=512,answer=64 --rate 1
      prelay bench serve --url grpc://127.0.0.1:8001 --dataset sharegpt:lengths.csv --max-tokens 2048 \\
          --rates 0.5,1,1.5,2 --seeds 3 --slo ttft=2,tpot=60ms --json --plot serve.png
      prelay bench serve --url http://127.0.0.1:8000 --trace azure.csv --length-scale 0.25 --rate 2
    """
    from bench.load.connect import check_url
    from bench.load.options import header_of, plan_of, source_of

    try:
        plan = plan_of(chosen)
        check_url(chosen["url"])
        headers = dict(header_of(text) for text in chosen["headers"])
    except BadInputError as error:
        raise click.UsageError(str(error)) from error
    need_matplotlib(plot)
    need_directory("--requests-out", requests_out)
    raise_file_limit()
    try:
        measured = asyncio.run(_measure(chosen, plan, headers))
    except BadInputError as error:
        raise click.UsageError(str(error)) from error
    result = {
        "url": chosen["url"],
        "dataset": source_of(chosen),
        "length_scale": chosen["length_scale"],
        "max_tokens": chosen["max_tokens"],
        **measured.to_json(),
    }
    if plot is not None:
        from bench.load.plots import draw_serve

        draw_serve(measured, f"{chosen['url']}, {source_of(chosen)}", plot)
    if requests_out is not None:
        from bench.load.requests_csv import write_requests

        write_requests(measured, requests_out)
    if as_json:
        click.echo(json.dumps(result))
    else:
        for table in _tables(result):
            Console().print(table)
    if warning := result["client"]["warning"]:
        click.echo(f"prelay: warning: {warning}", err=True)
    return 0


async def _measure(chosen: dict[str, Any], plan: ServePlan, headers: dict[str, str]) -> Measured:
    from bench.load.connect import connect
    from bench.load.serve import measure, vocabulary_of

    connected = connect(
        chosen["url"],
        model=chosen["model"],
        prompts=chosen["prompts"],
        vocabulary=vocabulary_of(plan.vocab_size),
        headers=headers,
    )
    with progress("bench serve") as show:
        async with connected as target:
            return await measure(target, plan, show)


def _tables(result: dict[str, Any]) -> list[Table]:
    slo = result["slo"]
    title = f"{result['model']}, TTFT <= {slo['ttft']}, TPOT <= {slo['tpot']}\n{result['dataset']}"
    spread = "ms, p50 / p90 / p99"
    curve = Table("req/s", "sent", "good", "goodput", f"TTFT {spread}", f"TPOT {spread}", title=title)
    lengths = Table("req/s", "prompt", "requests", "good", title="by length of the prompt")
    for rate in result["rates"]:
        name = "trace" if rate["rate"] is None else f"{rate['rate']:g}"
        share, goodput = f"{rate['attainment']:.1%}", f"{rate['goodput']:.2f}/s"
        times = milliseconds(rate["ttft_s"]), milliseconds(rate["tpot_s"])
        curve.add_row(name, str(rate["requests"]), share, goodput, *times)
        for length, found in rate["by_length"].items():
            lengths.add_row(name, length, str(found["requests"]), f"{found['attainment']:.1%}")
    curve.caption = "\n".join(_notes(result))
    return [curve, lengths]


def _notes(result: dict[str, Any]) -> Iterator[str]:
    for found in result["crossings"]:
        highest = f"{found['bound']} {found['rate']:.3g}".strip()
        seeds = f"seeds {found['least']:.3g} - {found['greatest']:.3g}"
        yield f"{found['target']:.0%} up to {highest} req/s ({seeds})"
    errors = Counter[str]()
    for rate in result["rates"]:
        errors.update(rate["errors"])
        misses = [f"{count} {name}" for name, count in rate["outcomes"].items() if count and name != "good"]
        if misses:
            name = "trace" if rate["rate"] is None else f"{rate['rate']:g} req/s"
            yield f"{name}: {', '.join(misses)}"
    for message, count in errors.most_common(_NUM_ERRORS):
        yield f"{count} x {message}"
    yield f"client: {result['client']['cpu_share']:.0%} of a core"
