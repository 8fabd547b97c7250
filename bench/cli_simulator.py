"""`prelay bench simulator`: the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from bench.cli_parts import progress
from cluster.simulator.errors import SimulationError
from cluster.workload.errors import BadInputError


@click.command()
@click.option("--trace", type=Path, metavar="FILE", help="Lengths (default: synthetic ones).")
@click.option(
    "--max-tokens",
    type=click.IntRange(2),
    default=16_384,
    show_default=True,
    metavar="N",
    help="Leave out longer rows.",
)
@click.option(
    "--count", type=click.IntRange(1), default=2000, show_default=True, metavar="N", help="Requests."
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=1.5,
    show_default=True,
    metavar="R",
    help="Requests per second for each pair of workers.",
)
@click.option(
    "--pairs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Prefill workers, and as many decode workers.",
)
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="Times that each is run."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def simulator(
    trace: Path | None, max_tokens: int, count: int, rate: float, pairs: int, rounds: int, as_json: bool
) -> int:
    """Requests that the simulator simulates a second, on one core: OPT-13B on A100s, Poisson arrivals.

    \b
    Examples:
      prelay bench simulator --trace AzureLLMInferenceTrace_conv.csv --count 10000 --json
      prelay bench simulator --pairs 500 --count 1000000 --rounds 1
    """
    from bench.simulator import jobs_of, measure
    from cluster.workload.arrivals import Arrivals, Process
    from cluster.workload.datasets import load_dataset
    from cluster.workload.drawing import WorkloadSpec, arrivals

    source = "synthetic:prompt=200-2000,answer=20-400" if trace is None else f"trace:{trace}"
    if not math.isfinite(rate):
        raise click.UsageError(f"--rate {rate:g}: a number greater than 0 is needed")
    try:
        dataset = load_dataset(source, max_tokens=max_tokens)
        spec = WorkloadSpec(dataset, Arrivals(Process.POISSON), range(0))
        with progress("bench simulator") as show:
            result = measure(jobs_of(pairs), arrivals(spec, 0, rate * pairs, count=count), rounds, show)
    except (BadInputError, SimulationError) as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        click.echo(json.dumps(result))
        return 0
    table = Table(
        "simulation", "requests/s (least - greatest)", "complete",
        title=f"{count} requests on {pairs} + {pairs} workers, {source}",
    )  # fmt: skip
    for job in result["jobs"]:
        speed = f"{job['requests_s']:.0f} ({job['least']:.0f} - {job['greatest']:.0f})"
        table.add_row(job["name"], speed, f"{job['complete']} of {job['requests']}")
    table.caption = f"peak memory {result['peak_memory_bytes'] / 1e6:.0f} MB"
    Console().print(table)
    return 0
