"""The same with real workers, a real router and real load, on this machine.

Every shape that can serve gets the whole of what comes, one deployment after the other, and then the
controller does. So the oracle is taken from the same runs as the roles that stay: for each phase it has the
shape that was best in it, with whatever the phase before had left.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.controller.phases import Shift
from bench.controller.report import CONTROLLER, Judge, Ran, check_possible, report, shapes_of
from bench.goodput.visit import Visit, send, spec_of, visiting
from cluster.config import ServeConfig
from cluster.errors import WorkerError
from cluster.role_decider import Shape
from cluster.roles import ROLE_NAMES
from cluster.router_admin import RouterAdmin
from cluster.workload.arrivals import Arrivals
from cluster.workload.drawing import workload
from cluster.workload.jobs import Job, Row
from cluster.workload.slo import Limits
from router.pool_view import Role

_SAYS = "controller: "
_LOOK_S = 1.0

Show = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class LiveExperiment:
    """config: of a deployment under the limits, with as many workers as there are. timeout_s: after which a
    request is given up that cannot be good any more."""

    config: ServeConfig
    shift: Shift
    limits: Limits
    seeds: int
    timeout_s: float

    @property
    def num_workers(self) -> int:
        return sum(pool.replicas for pool in self.config.pools.values())

    def of(self, shape: Shape, *, acts: bool) -> ServeConfig:
        """A deployment that begins with that shape. acts: with a controller."""
        changes: dict[str, Any] = {
            role.value: self.config.pools[role.value].model_copy(
                update={"replicas": getattr(shape, role.value)}
            )
            for role in Role
        }
        mode = "act" if acts else "none"
        changes["controller"] = self.config.controller.model_copy(update={"mode": mode})
        return self.config.model_copy(update=changes)


@dataclass(slots=True)
class _Run:
    """What happened to one deployment. shapes: (seconds since the first phase began, roles from then on).
    said: of its controller, with when."""

    rows: Sequence[Row] = ()
    shapes: list[tuple[float, Shape]] = field(default_factory=list)
    said: list[tuple[float, str]] = field(default_factory=list)


async def measure_live(experiment: LiveExperiment, show: Show) -> dict[str, Any]:
    """Raises MeasurementError, BadInputError."""
    shift, judge = experiment.shift, Judge(experiment.shift, experiment.limits)
    shapes, seeds = shapes_of(experiment.num_workers), range(experiment.seeds)
    done, count = 0, (len(shapes) + 1) * experiment.seeds

    async def run(shape: Shape, seed: int, name: str, *, acts: bool = False) -> _Run:
        nonlocal done
        share = done / count

        def told(said: str) -> None:
            show(share, f"{name}: {said}")

        found = await _run(experiment.of(shape, acts=acts), experiment, seed, told)
        done += 1
        return found

    fixed = {shape: [(await run(shape, seed, str(shape))).rows for seed in seeds] for shape in shapes}
    goods = {
        shape: [sum(some) / len(some) for some in zip(*map(judge.goods, rows), strict=True)]
        for shape, rows in fixed.items()
    }
    best = [
        max(((shape, good[number]) for shape, good in goods.items()), key=lambda one: one[1])
        for number in range(len(shift.phases))
    ]
    check_possible(best, experiment.num_workers)
    first, best_fixed = best[0][0], max(shapes, key=lambda shape: judge.whole(goods[shape]))
    runs = [await run(first, seed, CONTROLLER, acts=True) for seed in seeds]
    details = {
        "shapes": [[{"at_s": at_s, "shape": str(shape)} for at_s, shape in one.shapes] for one in runs],
        "said": [[{"at_s": at_s, "line": line} for at_s, line in one.said] for one in runs],
    }
    ran = [
        Ran(CONTROLLER, first, [one.rows for one in runs], details),
        Ran("first stays", first, fixed[first]),
        Ran("best stays", best_fixed, fixed[best_fixed]),
    ]
    everything = {str(shape): good for shape, good in goods.items()}
    devices = experiment.config.num_cpus
    return {"simulated": False, **report(judge, devices, best, ran), "goodput_of_shapes": everything}


async def _run(
    config: ServeConfig, experiment: LiveExperiment, seed: int, show: Callable[[str], None]
) -> _Run:
    """One deployment, from its start to its end."""
    found, began = _Run(), time.monotonic()

    def told(line: str) -> None:
        _, is_said, words = line.partition(_SAYS)
        if is_said and found.shapes:  # else it only starts
            found.said.append((time.monotonic() - began, words))
        show(line)

    async with visiting(config, told) as visit:
        jobs = _jobs(experiment.shift, visit, seed)
        admin = RouterAdmin(visit.served.admin, None)
        began = time.monotonic()
        watching = asyncio.create_task(_watch(admin, found.shapes, began))
        try:
            sent = await send(visit, jobs, experiment.limits, experiment.timeout_s, told)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
    found.rows = sent.rows
    return found


def _jobs(shift: Shift, visit: Visit, seed: int) -> list[Job]:
    """The arrivals of the shift, each with a prompt that nobody has seen."""
    jobs: list[Job] = []
    for begin_s, phase, own_seed in shift.placed(seed):
        spec = spec_of(phase.source, visit.vocabulary, visit.served.grpc, own_seed)
        spec = replace(spec, arrivals=Arrivals.parse("poisson"))
        drawn = workload(spec, own_seed, phase.rate, count=phase.count)
        jobs += [replace(job, arrival_s=begin_s + job.arrival_s) for job in drawn]
    return sorted(jobs, key=lambda job: job.arrival_s)


async def _watch(admin: RouterAdmin, shapes: list[tuple[float, Shape]], began: float) -> None:
    """Notes the roles of workers that serve whenever they are others; for ever."""
    while True:
        try:
            status = await admin.status()
        except WorkerError:  # it is busy, or ends
            continue
        finally:
            await asyncio.sleep(_LOOK_S)
        counts = Counter(ROLE_NAMES.get(one.info.role) for one in status.workers if one.up)
        shape = Shape(*(counts[role.value] for role in Role))
        if not shapes or shapes[-1][1] != shape:
            shapes.append((time.monotonic() - began if shapes else 0.0, shape))
