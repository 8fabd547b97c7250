"""`prelay simulate`: the command line of the simulator."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from bench.cli_parts import milliseconds, need_directory, need_matplotlib, progress
from cluster.simulator.errors import SimulationError
from cluster.workload.errors import BadInputError
from cluster.workload.jobs import TIMEOUT_S
from cluster.workload.slo import DEFAULT

if TYPE_CHECKING:
    from bench.simulate.measure import Simulated

_COLUMNS = (
    "rate", "seed", "arrival_s", "prompt_tokens", "output_tokens", "status", "outcome", "ttft_s", "tpot_s",
    "end_s", "error",
)  # fmt: skip
_OF_PRELAY = {
    "policy": "--policy", "kv_tokens": "--kv-tokens", "kv_bytes": "--kv-bytes", "link": "--link",
    "max_batch_tokens": "--max-batch-tokens", "max_num_seqs": "--max-num-seqs", "noise": "--noise",
    "timeout": "--timeout", "faults": "--fault", "step_by_step": "--step-by-step",
}  # fmt: skip
_EXIT_CODES = """
\b
Exit codes:
  0  done, whatever the figures are
  2  the command line, the profile, the trace or the dataset is wrong
"""


@click.command(epilog=_EXIT_CODES)
@click.option(
    "--mode",
    type=click.Choice(["prelay", "distserve", "distserve-colocated"]),
    default="prelay",
    show_default=True,
    help="prelay's own cores with memory, transfer and router, or the rules of DistServe's simulator.",
)
@click.option(
    "--profile",
    type=Path,
    required=True,
    metavar="FILE",
    help="Of `prelay profile --json` or of DistServe.",
)
@click.option("--model", metavar="NAME", help="In a profile of DistServe's; else for --kv-bytes.")
@click.option("--prefill", metavar="SPLIT", help="tp=1,pp=1,replicas=1 of the prefill workers.")
@click.option("--decode", metavar="SPLIT", help="The same of the decode workers.")
@click.option("--mixed", metavar="SPLIT", help="The same of mixed workers.")
@click.option("--policy", default="goodput", show_default=True, metavar="NAME", help="The router's.")
@click.option(
    "--trace",
    type=Path,
    metavar="FILE",
    help="Azure CSV, Mooncake JSONL, length CSV, or arrival_s,prompt_tokens,output_tokens.",
)
@click.option("--dataset", metavar="NAME:...", help="synthetic:prompt=512,answer=64, sharegpt:FILE, mix:...")
@click.option("--rate", type=float, metavar="R", help="Requests per second (default: the trace's own pace).")
@click.option("--rates", metavar="A,B,C", help="Several rates, for the curve of attainment.")
@click.option("--count", type=click.IntRange(1), metavar="N", help="Requests at each rate (default 1000).")
@click.option("--duration", type=float, metavar="S", help="Seconds at each rate, instead.")
@click.option("--arrivals", metavar="PROCESS", help="poisson (default), gamma:CV, constant, trace.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Runs.")
@click.option("--time-scale", type=float, metavar="F", help="Seconds that a second of the trace takes.")
@click.option(
    "--length-scale", type=float, default=1.0, show_default=True, metavar="F", help="Of prompts and answers."
)
@click.option("--max-tokens", type=click.IntRange(2), metavar="N", help="Leave out longer rows.")
@click.option(
    "--slo",
    "slo_text",
    default=DEFAULT,
    show_default=True,
    metavar="LIMITS",
    help="ttft=2,tpot=60ms, or multiples of what a request takes alone in the simulation.",
)
@click.option("--kv-tokens", type=click.IntRange(16), metavar="N", help="Room of each worker's KV cache.")
@click.option("--kv-bytes", type=click.IntRange(0), metavar="N", help="Of the KV of a token.")
@click.option(
    "--link",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="GB/s",
    help="What each worker sends and receives of KV.",
)
@click.option(
    "--max-batch-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    metavar="N",
    help="Most tokens in one step.",
)
@click.option(
    "--max-num-seqs",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    metavar="N",
    help="Most sequences that decode on a worker.",
)
@click.option(
    "--noise",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    metavar="SIGMA",
    help="Spread of step times, of their logarithm.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=TIMEOUT_S,
    show_default=True,
    metavar="S",
    help="After which a client gives up.",
)
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="WORKER:AT:DOWN",
    help="decode-0:30:5 dies 30 s after the start and is back 5 s later; may be given more than once.",
)
@click.option("--step-by-step", is_flag=True, help="Take decode steps one by one: the same result, slower.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option("--plot", type=Path, metavar="FILE.png", help="Draw the result.")
@click.option("--requests", "requests_out", type=Path, metavar="FILE.csv", help="Write a row a request.")
def simulate(as_json: bool, plot: Path | None, requests_out: Path | None, **chosen: Any) -> int:
    """What a cluster would do with a workload, in virtual time: goodput before there are devices.

    In mode prelay the schedulers, block pools and the router's policy are those that serve; engines are
    replaced by the times that a profile gives for their steps, links by a bandwidth. The modes of DistServe
    follow the rules of its own simulator, to compare with it request by request.

    \b
    Examples:
      prelay profile --shape smollm2-135m --json core.json
      prelay simulate --profile core.json --model smollm2-135m --dataset synthetic:prompt=512,answer=64 \\
          --rates 0.5,1,1.5,2 --slo ttft=2,tpot=60ms --plot simulated.png
      prelay simulate --mode distserve --profile a100-80g.opt-13b.distserve.json --model opt-13b \\
          --prefill tp=2 --decode tp=1 --trace job.csv --slo ttft=0.25,tpot=0.1 --json
    """
    need_matplotlib(plot)
    need_directory("--requests", requests_out)
    _refuse_what_is_ignored(chosen["mode"])
    from bench.simulate.measure import measure
    from bench.simulate.plan import plan_of

    try:
        with progress("simulate") as show:
            simulated = measure(plan_of(chosen), show)
    except (BadInputError, SimulationError) as error:
        raise click.UsageError(str(error)) from error
    result = simulated.to_json()
    if plot is not None:
        from bench.load.plots import draw_serve

        draw_serve(simulated.measured, simulated.plan.title, plot)
    if requests_out is not None:
        _write_requests(simulated, requests_out)
    if as_json:
        click.echo(json.dumps(result))
    else:
        Console().print(_table(result))
    return 0


def _refuse_what_is_ignored(mode: str) -> None:
    """Raises click.UsageError for what somebody gave, and DistServe's rules have no place for."""
    if mode == "prelay":
        return
    context = click.get_current_context()
    for name, flag in _OF_PRELAY.items():
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{flag} is for --mode prelay; by the rules of --mode {mode} it has no meaning"
            )


def _write_requests(simulated: Simulated, target: Path) -> None:
    """A row for each request, in the order of arrival. output_tokens: as asked for."""
    from cluster.workload.judge import outcome_of

    slo = simulated.measured.slo
    with target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for run, requests in zip(simulated.measured.runs, simulated.requests, strict=True):
            for row, arrival in zip(run.rows, requests, strict=True):
                times = (row.ttft_s, row.tpot_s, row.last_s)
                writer.writerow(
                    [
                        "" if run.rate is None else run.rate,
                        run.seed,
                        f"{row.arrival_s:.6f}",
                        row.prompt_tokens,
                        arrival.shape.output_tokens,
                        row.status.value,
                        outcome_of(row, slo).value,
                        *("" if value is None else f"{value:.9f}" for value in times),
                        row.error,
                    ]
                )


def _table(result: dict[str, Any]) -> Table:
    slo = result["slo"]
    spread = "ms, p50 / p90 / p99"
    table = Table(
        "req/s", "requests", "good", "TTFT ok", "TPOT ok", f"TTFT {spread}", f"TPOT {spread}",
        title=f"{result['cluster']}\nTTFT <= {slo['ttft']}, TPOT <= {slo['tpot']}",
    )  # fmt: skip
    for rate in result["rates"]:
        shares = (rate[name] for name in ("attainment", "ttft_attainment", "tpot_attainment"))
        table.add_row(
            "trace" if rate["rate"] is None else f"{rate['rate']:g}",
            str(rate["requests"]),
            *(f"{share:.1%}" for share in shares),
            milliseconds(rate["ttft_s"]),
            milliseconds(rate["tpot_s"]),
        )
    found = []
    for one in result["crossings"]:
        highest = f"{one['bound']} {one['rate']:.3g}".strip()
        found.append(f"{one['target']:.0%} up to {highest} req/s")
    speed = f"{result['requests_per_wall_s']:.0f} requests simulated a second"
    table.caption = "\n".join([*found, speed])
    return table
