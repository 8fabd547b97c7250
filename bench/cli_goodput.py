"""`prelay bench goodput`: the command line of the comparison of deployments."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from contextlib import nullcontext
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
from cluster.simulator.errors import SimulationError
from cluster.workload.errors import BadInputError

if TYPE_CHECKING:
    from bench.goodput.experiment import Experiment
    from bench.goodput.teller import Teller
    from engine.latency import LatencyModel

_SHAPES = Path(__file__).parent / "shapes"
_EXIT_CODES = """
\b
Exit codes:
  0  done, whatever the figures are
  1  a deployment did not start or ended, or no request can meet the limits
  2  the command line, the experiment or a trace is wrong
  130  interrupted; what was measured until then is in the file
"""


@click.command(epilog=_EXIT_CODES)
@click.option(
    "--config", "config_file", type=Path, required=True, metavar="FILE.yaml", help="The experiment."
)
@click.option(
    "--traces",
    type=Path,
    metavar="DIR",
    help="Where the files of the workloads are (default: where FILE.yaml is).",
)
@click.option("--workloads", metavar="A,B", help="Only these.")
@click.option("--deployments", metavar="A,B", help="Only these.")
@click.option("--rounds", type=click.IntRange(1), metavar="N", help="Instead of measure.rounds.")
@click.option("--seconds", type=float, metavar="S", help="Instead of measure.seconds.")
@click.option(
    "--only-90",
    is_flag=True,
    help="Search the rate at 90 % alone; that at 99 % is read off the same points.",
)
@click.option(
    "--overload",
    is_flag=True,
    help="Then 0.5, 1, 1.5 and 3 times each one's own 90 % rate, and how it recovers.",
)
@click.option(
    "--map", "as_map", is_flag=True, help="Instead, the plane of limits (the part map of FILE.yaml)."
)
@click.option(
    "--simulate",
    is_flag=False,
    flag_value="",
    metavar="[PROFILE.json]",
    help="In virtual time, with step times of `prelay profile --json FILE` (default: of model.profile).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option("--plot", type=Path, metavar="FILE.png", help="Draw the result.")
@click.option(
    "--resume",
    type=Path,
    metavar="FILE.json",
    help="Keep every point here, and do not measure again what is here already (default: a new file).",
)
def goodput(as_json: bool, plot: Path | None, resume: Path | None, **chosen: Any) -> int:
    """Goodput per device of deployments on the same cores: each is started, loaded and stopped in turn.

    For each workload and deployment the highest rate is searched at which 90 % (and 99 %) of all requests
    meet both limits. Rounds, each with a seed of its own, visit all deployments in a changing order. Every
    point is kept as soon as it is measured: Ctrl-C loses only the one that runs, --resume goes on.

    \b
    Examples:
      prelay bench goodput --config deploy/bench/two-cores.yaml --traces ~/traces --plot all.png
      prelay bench goodput --config deploy/bench/two-cores.yaml --resume chat.json --overload --json
      prelay bench goodput --config deploy/bench/large-pools.yaml --rounds 1 --seconds 20
      prelay bench goodput --config deploy/bench/two-cores.yaml --map --simulate core.json --plot map.png
    """
    need_matplotlib(plot)
    need_directory("--resume", resume)
    target = resume or Path(time.strftime("goodput-%Y%m%d-%H%M%S.json"))
    raise_file_limit()
    try:
        experiment = _experiment(chosen)
        with tempfile.TemporaryDirectory(prefix="prelay-bench-") as folder, telling("goodput") as teller:
            result = asyncio.run(_measure(experiment, chosen, target, Path(folder), teller, plot))
    except (BadInputError, SimulationError) as error:
        raise click.UsageError(str(error)) from error
    except MeasurementError as error:
        raise MeasurementError(f"{error}\n{kept_in(target)}") from error
    except (KeyboardInterrupt, asyncio.CancelledError):
        click.echo(f"prelay: interrupted; {kept_in(target)}", err=True)
        return 130
    if as_json:
        click.echo(json.dumps(result))
    else:
        _print(result)
    click.echo(kept_in(target), err=True)
    return 0


async def _measure(
    experiment: Experiment,
    chosen: dict[str, Any],
    target: Path,
    folder: Path,
    teller: Teller,
    plot: Path | None,
) -> dict[str, Any]:
    from bench.goodput.overload import measure_overload
    from bench.goodput.plan import machine_of, plan_of
    from bench.goodput.plane import map_plan, measure_map
    from bench.goodput.record import Record
    from bench.goodput.report import result_of
    from bench.goodput.run import measure_rounds
    from bench.goodput.simulated import Simulator

    end_on_sigterm()
    profile = _profile(experiment, chosen, folder)
    about: dict[str, Any] = {
        "about": about_machine(),
        "measure": experiment.measure.model_dump(mode="json"),
        "simulated": None if profile is None else profile.to_json(),
    }
    traces = chosen["traces"] or chosen["config_file"].absolute().parent
    if chosen["as_map"]:
        if experiment.map is None:
            raise BadInputError("--map: the experiment has no part `map`")
        if chosen["overload"]:
            raise BadInputError(
                "--overload is of workloads, and --map of the plane of limits; give one of them"
            )
        plan = map_plan(experiment, _SHAPES, folder)
    else:
        plan = plan_of(experiment, _SHAPES, traces, folder)
    simulated = None if profile is None else json.dumps(profile.to_json(), sort_keys=True)
    record = Record.open(target, experiment, about["about"], simulated)
    async with nullcontext(Simulator(profile)) if profile else machine_of(plan, record) as venue:
        if chosen["as_map"]:
            result = {**about, "map": await measure_map(plan, record, teller, venue)}
        else:
            curves = await measure_rounds(plan, record, teller, venue)
            result = result_of(curves, record, about)
            if chosen["overload"]:
                result["overload"] = await measure_overload(plan, curves, record, teller, venue)
    if plot is not None:
        _draw(result, plot)
    return result


def _draw(result: dict[str, Any], plot: Path) -> None:
    from bench.goodput.plots import draw_goodput, draw_map, draw_overload

    is_simulated = result["simulated"] is not None
    if "map" in result:
        draw_map(result["map"], plot, is_simulated=is_simulated)
        return
    draw_goodput(result, plot, is_simulated=is_simulated)
    if "overload" in result:
        overload_plot = plot.with_stem(f"{plot.stem}-overload")
        draw_overload(result["overload"], overload_plot, is_simulated=is_simulated)


def _profile(experiment: Experiment, chosen: dict[str, Any], folder: Path) -> LatencyModel | None:
    """To simulate with; None to measure. Raises BadInputError."""
    from bench.goodput.checkpoint import profile_of
    from cluster.errors import ConfigError
    from cluster.latency_profile import read_profile

    if chosen["simulate"] is None:
        return None
    given = Path(chosen["simulate"]) if chosen["simulate"] else profile_of(experiment.model, folder)
    if given is None:
        raise BadInputError(
            "--simulate: the experiment's model has no profile; give one, as `prelay profile --shape NAME "
            "--threads 1 --json FILE` writes it"
        )
    try:
        return read_profile(given)
    except ConfigError as error:
        raise BadInputError(str(error).replace("model.profile", "--simulate", 1)) from error


def _experiment(chosen: dict[str, Any]) -> Experiment:
    """With what the command line says instead. Raises BadInputError."""
    from bench.goodput.experiment import chosen_part, load_experiment

    return chosen_part(
        load_experiment(chosen["config_file"]),
        names_of(chosen["workloads"]),
        names_of(chosen["deployments"]),
        chosen["rounds"],
        chosen["seconds"],
        only_90=chosen["only_90"],
    )


def _print(result: dict[str, Any]) -> None:
    console = wide_console()
    from bench.goodput.report import tables

    for table in tables(result) if "workloads" in result else ():
        console.print(table)
    if "overload" in result:
        from bench.goodput.overload import overload_table

        console.print(overload_table(result["overload"]))
    if "map" in result:
        from bench.goodput.plane import map_tables

        for table in map_tables(result["map"]):
            console.print(table)
