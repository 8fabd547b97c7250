"""`prelay plan`: the command line of the planner."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from bench import simulating
from bench.cli_parts import need_directory, need_matplotlib, progress
from cluster.cli_options import not_nan, tls_option
from cluster.planner.errors import PlanError
from cluster.simulator.errors import SimulationError
from cluster.workload.errors import BadInputError
from engine.latency import ProfileError

if TYPE_CHECKING:
    from bench.plan.options import Asked
    from bench.plan.report import Found

_EXIT_CODES = """
\b
Exit codes:
  0  there is a plan
  1  there is none: the model fits nowhere, or the limits cannot be kept
  2  the command line, the profile, the trace or the dataset is wrong
"""


@click.command(epilog=_EXIT_CODES)
@click.option("--model", metavar="NAME", help="A checkpoint, a shape of prelay's, or one of the profile's.")
@click.option(
    "--profile",
    type=Path,
    metavar="FILE",
    help="Measured step times: of `prelay profile --json`, DistServe (JSON) or Splitwise (CSV).",
)
@click.option("--gpus", metavar="KIND:N,...", help="a100-80g:16,h100-80g:8, or KIND:N:PRICE an hour.")
@click.option(
    "--live",
    metavar="HOST:PORT",
    help="Admin port of a running router: plan for what it has seen, and without --gpus for its workers.",
)
@tls_option
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
    metavar="LIMITS",
    help="ttft=0.25,tpot=0.1, or multiples of the usual request alone on the fastest worker (with --live: "
    "default the limits of its busiest class).",
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
    "--kv-tokens",
    type=click.IntRange(16),
    metavar="N",
    help="Room of a worker's KV cache, with a profile of prelay's.",
)
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
@click.option(
    "--for-rate",
    type=click.FloatRange(0, 1e6, min_open=True),
    callback=not_nan,
    metavar="R",
    help="Requests/s: the cheapest plan that serves them, by --objective.",
)
@click.option("--what-if", is_flag=True, help="Then with longer prompts, slower links, and twice the rate.")
@click.option("--no-transfer", is_flag=True, help="Leave out that hand-offs take time.")
@click.option("--no-memory", is_flag=True, help="Leave out that workers hold only so much KV.")
@click.option(
    "--context-parallel",
    type=click.IntRange(1),
    default=1,
    metavar="N",
    help="Devices that share a prompt's context; the engine has only 1 yet.",
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
      prelay plan --profile core.json --gpus core:4 --kv-tokens 32768 \\
          --dataset synthetic:prompt=512,answer=64 --slo ttft=2,tpot=60ms
      prelay plan --live 127.0.0.1:9091 --explain
      prelay plan --profile a100-80g.opt-13b.distserve.json --model opt-13b --gpus a100-80g:4 \\
          --dataset sharegpt:lengths.csv --max-tokens 2048 --slo ttft=0.2,tpot=0.1 --mode distserve --json
    """
    need_matplotlib(plot)
    need_directory("--out", out)
    from bench.plan.options import asked_of, model_section
    from bench.plan.report import draw, explanation, lines, table, to_json, write_plan
    from cluster.errors import NoRouterError
    from cluster.planner.errors import NoPlanError

    began = time.perf_counter()
    try:
        asked = asked_of(chosen)
        found = _found(asked, for_rate=chosen["for_rate"], what_if=chosen["what_if"])
    except (NoPlanError, NoRouterError) as error:
        raise click.ClickException(str(error)) from error
    except (BadInputError, SimulationError, PlanError, ProfileError) as error:
        raise click.UsageError(str(error)) from error
    question, answer = asked.question, found.answer
    if out is not None:
        write_plan(question, found.chosen, model_section(chosen["model"], question, found.chosen), out)
    if plot is not None:
        draw(question, answer, plot)
    if as_json:
        click.echo(json.dumps(to_json(asked, found, time.perf_counter() - began)))
        return 0
    Console().print(table(question, answer))
    for line in lines(asked, found):
        click.echo(line)
    for line in explanation(question, answer) if explain else ():
        click.echo(f"- {line}")
    return 0


def _processes() -> ProcessPoolExecutor:
    """One for each core. They start anew, and would know nothing of how this one began."""
    return ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn"), simulating.begin)


def _found(asked: Asked, *, for_rate: float | None, what_if: bool) -> Found:
    """Raises NoPlanError."""
    from bench.plan.report import Found
    from cluster.planner.cheapest import cheapest
    from cluster.planner.search import search
    from cluster.planner.sensitivity import sensitivity

    question = asked.question
    with progress("plan") as show, _processes() as executor:
        also = [] if asked.now is None else [asked.now]
        answer = search(question, asked.kinds, executor, show, also)
        enough = [] if for_rate is None else cheapest(question, answer, for_rate, executor, show)
        changes = sensitivity(question, answer, executor, show) if what_if else None
    return Found(answer, for_rate, enough, changes)
