"""From an experiment to a plan of which every part has been checked: nothing is started before."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bench.goodput.checkpoint import checkpoint_of, profile_of
from bench.goodput.experiment import Experiment
from bench.goodput.pace import machine_pace
from bench.goodput.record import Record
from bench.goodput.run import Plan
from bench.goodput.sources import source_of
from bench.goodput.variants import references, variants_of
from bench.goodput.venue import THIS_MACHINE, ThisMachine
from cluster.errors import ModelError
from cluster.workload.errors import BadInputError


@asynccontextmanager
async def machine_of(plan: Plan, record: Record) -> AsyncIterator[ThisMachine]:
    """This one, its pace followed if the experiment wants that. Raises MeasurementError."""
    if not plan.experiment.measure.follow_pace:
        yield THIS_MACHINE
        return
    num_cores = max(one.devices for some in plan.variants.values() for one in some)
    async with machine_pace(plan.references[0].config, num_cores, record) as pace:
        yield ThisMachine(pace)


def plan_of(experiment: Experiment, shapes: Path, traces: Path, folder: Path) -> Plan:
    """shapes: that come with prelay. traces: where files of workloads are. folder: for what has to be
    written. Raises BadInputError."""
    checkpoint, profile = (
        checkpoint_of(experiment.model, shapes, folder),
        profile_of(experiment.model, folder),
    )
    try:
        variants = {
            name: variants_of(experiment, name, checkpoint, profile) for name in experiment.deployments
        }
        alone = references(experiment, checkpoint, profile)
    except ModelError as error:
        raise BadInputError(f"model: {error}") from error
    longest = alone[0].config.model.max_model_len
    assert longest is not None
    sources = [source_of(name, part, traces, longest) for name, part in experiment.workloads.items()]
    return Plan(experiment, sources, variants, alone)
