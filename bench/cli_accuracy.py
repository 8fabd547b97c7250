"""`prelay bench accuracy`: the command line of the simulator's error."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.cli_parts import (
    about_machine,
    end_on_sigterm,
    kept_in,
    names_of,
    need_directory,
    need_matplotlib,
    raise_file_limit,
    telling,
    wide_console,
)
from bench.errors import MeasurementError
from cluster.workload.errors import BadInputError

if TYPE_CHECKING:
    from bench.accuracy.run import Compare, Rates
    from bench.goodput.experiment import Experiment
    from bench.goodput.teller import Teller

_HERE = Path(__file__).parent
_DEFAULT = _HERE / "accuracy" / "two-cores.yaml"
_SHARES = "0.5,0.7,0.9,1.2,1.6"
_EXIT_CODES = """
\b
Exit codes:
  0  done, whatever the errors are
  1  a deployment did not start or ended, or no request can meet the limits
  2  the command line, the experiment or a trace is wrong
  130  interrupted; what was measured until then is in the file
"""


@click.command(epilog=_EXIT_CODES)
@click.option(
    "--config",
    "config_file",
    type=Path,
    default=_DEFAULT,
    metavar="FILE.yaml",
    help="The experiment, as of `bench goodput` (default: one for two cores, without traces).",
)
@click.option("--traces", type=Path, metavar="DIR", help="Where the files of the workloads are.")
@click.option("--workloads", metavar="A,B", help="Only these.")
@click.option("--deployments", metavar="A,B", help="Only these.")
@click.option("--rates", metavar="A,B,C", help="Requests/s, the lightest first.")
@click.option(
    "--shares",
    default=_SHARES,
    show_default=True,
    metavar="A,B,C",
    help="Instead of rates: shares of what the simulator says that a deployment serves at 90 %.",
)
@click.option("--rounds", type=click.IntRange(1), metavar="N", help="Instead of measure.rounds.")
@click.option("--seconds", type=float, metavar="S", help="Instead of measure.seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option("--plot", type=Path, metavar="FILE.png", help="Draw real beside simulated.")
@click.option(
    "--resume",
    type=Path,
    metavar="FILE.json",
    help="Keep every point here, and do not measure again what is here already (default: a new file).",
)
def accuracy(as_json: bool, plot: Path | None, resume: Path | None, **chosen: Any) -> int:
    """How far the simulator is from real runs: the same arrivals, on this machine and simulated.

    Profiles a worker, brings up each deployment, loads it lightly once (what a cluster at work adds to the
    profile is learned from that run alone), then at several rates, and replays all of them in the simulator.

    \b
    Examples:
      prelay bench accuracy --plot accuracy.png
      prelay bench accuracy --config deploy/bench/two-cores.yaml --traces ~/traces --workloads chat \\
          --deployments goodput --rates 0.2,0.4,0.6 --json
    """
    need_matplotlib(plot)
    need_directory("--resume", resume)
    target = resume or Path(time.strftime("accuracy-%Y%m%d-%H%M%S.json"))
    raise_file_limit()
    try:
        experiment, rates = _experiment(chosen), _rates(chosen)
        with tempfile.TemporaryDirectory(prefix="prelay-bench-") as folder, telling("accuracy") as teller:
            traces = chosen["traces"] or chosen["config_file"].absolute().parent
            found = asyncio.run(_measure(experiment, rates, traces, target, Path(folder), teller))
    except BadInputError as error:
        raise click.UsageError(str(error)) from error
    except MeasurementError as error:
        raise MeasurementError(f"{error}\n{kept_in(target)}") from error
    except (KeyboardInterrupt, asyncio.CancelledError):
        click.echo(f"prelay: interrupted; {kept_in(target)}", err=True)
        return 130
    from bench.accuracy.report import draw, table, to_json

    if plot is not None:
        draw(found, plot)
    if as_json:
        click.echo(json.dumps({**to_json(found), **about_machine()}))
    else:
        wide_console().print(table(found))
    click.echo(kept_in(target), err=True)
    return 0


async def _measure(
    experiment: Experiment, rates: Rates, traces: Path, target: Path, folder: Path, teller: Teller
) -> list[Compare]:
    from bench.accuracy.run import measure_accuracy, profile_of
    from bench.goodput.plan import machine_of, plan_of
    from bench.goodput.record import Record

    end_on_sigterm()
    plan = plan_of(experiment, _HERE / "shapes", traces, folder)
    record = Record.open(target, experiment, about_machine())
    teller.expect(1)
    with teller.part("profile") as tell:
        profile = await profile_of(plan.references[0].config, record, tell)
    async with machine_of(plan, record) as machine:
        return await measure_accuracy(plan, profile, rates, record, teller, machine)


def _experiment(chosen: dict[str, Any]) -> Experiment:
    """With what the command line says instead. Raises BadInputError."""
    from bench.goodput.experiment import chosen_part, load_experiment

    return chosen_part(
        load_experiment(chosen["config_file"]),
        names_of(chosen["workloads"]),
        names_of(chosen["deployments"]),
        chosen["rounds"],
        chosen["seconds"],
    )


def _rates(chosen: dict[str, Any]) -> Rates:
    """Raises BadInputError."""
    from bench.accuracy.run import Rates

    given = None if chosen["rates"] is None else _numbers("--rates", chosen["rates"])
    return Rates(given, _numbers("--shares", chosen["shares"]))


def _numbers(flag: str, text: str) -> list[float]:
    """In order, each once. Raises BadInputError."""
    try:
        found = {float(part) for part in text.split(",")}
    except ValueError:
        found = {0.0}
    if not all(0 < number < float("inf") for number in found):
        raise BadInputError(f"{flag} {text!r}: numbers greater than 0 are needed, as in 0.5,1,1.5")
    return sorted(found)
