"""`prelay bench controller`: the command line."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from bench.cli_parts import need_matplotlib, progress
from cluster.errors import ModelError
from cluster.simulator.errors import SimulationError
from cluster.workload.errors import BadInputError

if TYPE_CHECKING:
    from bench.controller.live import LiveExperiment
    from bench.controller.measure import Experiment, Show

_SHAPES = Path(__file__).parent / "shapes"
_EXIT_CODES = """
\b
Exit codes:
  0  done, whatever the figures are
  1  a deployment did not start, or has ended
  2  the command line, the experiment or a trace is wrong
  130  interrupted
"""


@click.command(epilog=_EXIT_CODES)
@click.option(
    "--config",
    "config_file",
    type=Path,
    required=True,
    metavar="FILE.yaml",
    help="An experiment of `prelay bench goodput`: its model, workers and workloads.",
)
@click.option(
    "--traces",
    type=Path,
    metavar="DIR",
    help="Where the files of the workloads are (default: where FILE.yaml is).",
)
@click.option(
    "--phases",
    required=True,
    metavar="A@R,B@R,...",
    help="What comes: workloads of FILE.yaml, one after the other, each with its requests/s.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=900.0,
    show_default=True,
    metavar="S",
    help="Of each phase.",
)
@click.option(
    "--slo", required=True, metavar="ttft=S,tpot=S", help="Limits of all requests, in seconds or ms."
)
@click.option("--workers", type=click.IntRange(2), default=8, show_default=True, metavar="N")
@click.option(
    "--away",
    type=click.FloatRange(0),
    default=2.0,
    show_default=True,
    metavar="S",
    help="That a drained worker is gone when it changes its role in virtual time.",
)
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True, metavar="N")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option("--plot", type=Path, metavar="FILE.png", help="Draw the result.")
def controller(as_json: bool, plot: Path | None, **chosen: Any) -> int:
    """Whether `prelay serve --controller act` finds the roles that a workload calls for.

    Held against an oracle, which knows each phase and has from its beginning the shape that serves it best,
    and against roles that stay what they are. What changes roles is the code that serves. With a simulated
    model all is in virtual time: workers' steps take what the experiment's profile says, and forecasts take
    no time. Otherwise workers, router and load are real, one deployment after the other on this machine.

    \b
    Examples:
      prelay bench controller --config deploy/bench/large-pools.yaml --traces ~/traces \\
        --phases azure-conversation@9,azure-code@16,azure-conversation@9 --slo ttft=2,tpot=160ms
      prelay bench controller --config deploy/bench/two-cores.yaml --traces ~/traces --workers 2 \\
        --phases azure-conversation@2,azure-code@0.8 --seconds 300 --seeds 1 --slo ttft=2.5,tpot=25ms
    """
    need_matplotlib(plot)
    try:
        with tempfile.TemporaryDirectory(prefix="prelay-bench-") as folder:
            experiment = _experiment(chosen, Path(folder))
            with progress("bench controller") as show:
                result = _measured(experiment, show)
    except (BadInputError, SimulationError, ModelError) as error:
        raise click.UsageError(str(error)) from error
    if plot is not None:
        from bench.controller.plot import draw_controller

        draw_controller(result, plot)
    if as_json:
        click.echo(json.dumps(result))
    else:
        Console().print(_table(result))
    return 0


def _measured(experiment: Experiment | LiveExperiment, show: Show) -> dict[str, Any]:
    """Raises BadInputError, SimulationError, MeasurementError."""
    from bench.controller.live import LiveExperiment, measure_live
    from bench.controller.measure import measure

    if isinstance(experiment, LiveExperiment):
        return asyncio.run(measure_live(experiment, show))
    return measure(experiment, show)


def _experiment(chosen: dict[str, Any], folder: Path) -> Experiment | LiveExperiment:
    """Raises BadInputError, ModelError."""
    from bench.controller.live import LiveExperiment
    from bench.controller.measure import Experiment
    from bench.controller.phases import Shift
    from bench.goodput.checkpoint import checkpoint_of, profile_of
    from bench.goodput.experiment import DeploymentPart, load_experiment
    from bench.goodput.sources import source_of
    from bench.goodput.variants import variants_of
    from cluster.latency_profile import read_profile
    from cluster.workload.slo import Limits, Slo

    experiment = load_experiment(chosen["config_file"])
    slo = Slo.parse(chosen["slo"])
    if slo.ttft.relative or slo.tpot.relative:
        raise BadInputError("--slo: give seconds or ms, as in ttft=2,tpot=160ms; all phases have the same")
    profile = profile_of(experiment.model, folder)
    pools = {"prefill": {"replicas": 1}, "decode": {"replicas": chosen["workers"] - 1}}
    part = DeploymentPart(serve={"router": {"policy": "goodput"}, **pools, "mixed": {"replicas": 0}})
    experiment = experiment.model_copy(update={"deployments": {"workers": part}})
    checkpoint = checkpoint_of(experiment.model, _SHAPES, folder)
    [variant] = variants_of(experiment, "workers", checkpoint, profile)
    longest = variant.config.model.max_model_len
    assert longest is not None
    traces = chosen["traces"] or chosen["config_file"].absolute().parent
    named = {part.strip().rpartition("@")[0] for part in chosen["phases"].split(",")}
    sources = {
        name: source_of(name, workload, traces, longest)
        for name, workload in experiment.workloads.items()
        if name in named
    }
    shift = Shift.parse(chosen["phases"], chosen["seconds"], sources, list(experiment.workloads))
    limits = Limits(slo.ttft.value, slo.tpot.value)
    config, seeds = variant.under(limits), chosen["seeds"]
    if profile is None:
        return LiveExperiment(config, shift, limits, seeds, experiment.measure.timeout_s)
    return Experiment(config, read_profile(profile), shift, limits, seeds, chosen["away"])


def _table(result: dict[str, Any]) -> Table:
    """Good requests/s by phase, and how they compare with the oracle's."""
    phases = result["phases"]
    slo = result["slo"]
    table = Table(
        "roles",
        *(f"{one['workload']}, {one['rate']:g}/s" for one in phases),
        "of the oracle's",
        title=f"Good requests/s on {result['devices']} devices, TTFT {slo['ttft_s']:g} s, TPOT "
        f"{slo['tpot_s']:g} s, {'simulated' if result['simulated'] else 'real'}",
    )
    table.add_row(
        "oracle", *(f"{one['oracle']['goodput']:.2f} ({one['oracle']['shape']})" for one in phases), "100%"
    )
    for one in result["deployments"]:
        low, high = min(one["of_oracle_by_seed"]), max(one["of_oracle_by_seed"])
        spread = f" ({low:.0%} - {high:.0%})" if result["seeds"] > 1 else ""
        shares = zip(one["goodput"], one["of_oracle"], strict=True)
        name = "controller" if "shapes" in one else f"{one['name']} ({one['begins_with']})"
        table.add_row(
            name, *(f"{good:.2f} = {of:.0%}" for good, of in shares), f"{one['of_oracle_whole']:.0%}{spread}"
        )
    return table
