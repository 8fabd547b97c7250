"""`prelay plan`: the command line of the planner."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench.cli_parts import need_directory, need_matplotlib, progress
from cluster.planner.errors import PlanError
from cluster.simulator.errors import SimulationError
from cluster.workload.errors import BadInputError

_EXIT_CODES = """
\b
Exit codes:
  0  there is a plan
  1  there is none: the model fits nowhere, or the limits cannot be kept
  2  the command line, the profile, the trace or the dataset is wrong
"""


@click.command(epilog=_EXIT_CODES)
@click.option("--model", metavar="NAME", help="A checkpoint, a shape of prelay's, or one of the profile's.")
@click.option("--profile", type=Path, metavar="FILE", help="Of DistServe: measured instead of reckoned.")
@click.option(
    "--gpus", required=True, metavar="KIND:N,...", help="a100-80g:16,h100-80g:8, or KIND:N:PRICE an hour."
)
@click.option(
    "--per-node", type=click.IntRange(1), default=8, show_default=True, metavar="N", help="Devices of a node."
)
@click.option(
    "--inter",
    type=click.FloatRange(0, min_open=True),
    default=25.0,
    show_default=True,
    metavar="GB/s",
    help="Of a device to those of other nodes.",
)
@click.option("--trace", type=Path, metavar="FILE", help="Lengths, and arrivals with --arrivals trace.")
@click.option("--dataset", metavar="NAME:...", help="synthetic:prompt=512,answer=64, sharegpt:FILE, mix:...")
@click.option("--arrivals", metavar="PROCESS", help="poisson (default), gamma:CV, constant, trace.")
@click.option(
    "--length-scale", type=float, default=1.0, show_default=True, metavar="F", help="Of prompts and answers."
)
@click.option("--max-tokens", type=click.IntRange(2), metavar="N", help="Leave out longer rows.")
@click.option(
    "--slo",
    "slo_text",
    required=True,
    metavar="LIMITS",
    help="ttft=0.25,tpot=0.1, or multiples of the usual request alone on the fastest worker.",
)
@click.option(
    "--target",
    type=click.FloatRange(0.01, 0.999),
    default=0.9,
    show_default=True,
    metavar="SHARE",
    help="Of the requests, that have to meet both limits.",
)
@click.option(
    "--objective",
    type=click.Choice(["device", "cost", "watt"]),
    default="device",
    show_default=True,
    help="What goodput is divided by.",
)
@click.option(
    "--mode",
    type=click.Choice(["prelay", "distserve"]),
    default="prelay",
    show_default=True,
    help="Judge finalists with router, memory and transfer, or by the rules of DistServe's simulator.",
)
@click.option("--kv-bytes", type=click.IntRange(0), metavar="N", help="Of the KV of a token, with --profile.")
@click.option(
    "--count",
    type=click.IntRange(20),
    default=600,
    show_default=True,
    metavar="N",
    help="Requests of a trial, at least.",
)
@click.option(
    "--seeds", type=click.IntRange(1), default=2, show_default=True, metavar="N", help="Trials of each rate."
)
@click.option("--explain", is_flag=True, help="Say why the winner won, too.")
@click.option("--out", type=Path, metavar="FILE.yaml", help="Write the plan as `prelay serve` takes it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option("--plot", type=Path, metavar="FILE.png", help="Draw attainment, and what plans serve.")
def plan(as_json: bool, plot: Path | None, out: Path | None, explain: bool, **chosen: Any) -> int:
    """Which workers to run for a workload and its limits: how split, how many, on which devices.

    Each phase is optimised by itself first; finalists, mixed workers among them, are then simulated as a
    whole. With --profile step times are measured ones, else they are reckoned from data sheets and the
    model's shape, and the answer says so.

    \b
    Examples:
      prelay plan --model llama-3.1-8b --gpus h100-80g:8 --dataset synthetic:prompt=1024,answer=256 \\
          --slo ttft=0.5,tpot=0.03 --explain --out plan.yaml
      prelay plan --profile a100-80g.opt-13b.distserve.json --model opt-13b --gpus a100-80g:4 \\
          --dataset sharegpt:lengths.csv --max-tokens 2048 --slo ttft=0.2,tpot=0.1 --mode distserve --json
    """
    need_matplotlib(plot)
    need_directory("--out", out)
    from bench.plan.options import question_of
    from bench.plan.report import draw, explanation, table, to_json, write_plan
    from bench.simulate.kv import checkpoint_of
    from cluster.planner.errors import NoPlanError
    from cluster.planner.search import search

    began = time.perf_counter()
    processes = len(os.sched_getaffinity(0))
    try:
        question, kinds = question_of(chosen)
        with progress("plan") as show, ProcessPoolExecutor(processes, get_context("spawn")) as executor:
            answer = search(question, kinds, executor, show)
    except NoPlanError as error:
        raise click.ClickException(str(error)) from error
    except (BadInputError, SimulationError, PlanError) as error:
        raise click.UsageError(str(error)) from error
    best = answer.finalists[0].plan
    if out is not None:
        write_plan(question, best, checkpoint_of(chosen["model"]), out)
    if plot is not None:
        draw(question, answer, plot)
    if as_json:
        click.echo(json.dumps(to_json(question, answer, time.perf_counter() - began)))
        return 0
    Console().print(table(question, answer))
    for line in explanation(question, answer) if explain else ():
        click.echo(f"- {line}")
    return 0
