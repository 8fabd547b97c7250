"""What is measured, in which order, until nothing is missing.

1. What requests of every workload take alone, on the two smallest deployments: gives the limits.
2. Round by round, workload by workload: every deployment is started once, in an order that changes from round
   to round, measured at one rate after the other, and stopped. So what drifts hits all alike. A round has a
   seed of its own: arrivals and lengths depend on it and the rate alone, the same for all deployments, and
   as many arrive as the rate says.
   The first deployment begins at a rate that follows from what a request takes alone, the others where the
   best so far is.
3. Of the values that a deployment has to try, each begins in the first round at the rate that the best before
   it serves at 90 %, and is dropped there if it does not; so the likeliest is best named first. Those that
   were best for 90 % and for 99 % go on.

Everything is kept as soon as it is measured, and nothing that is kept is measured again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.goodput.curves import Curve
from bench.goodput.experiment import Experiment
from bench.goodput.limits import Idle, Typical
from bench.goodput.points import Point
from bench.goodput.record import Record
from bench.goodput.search import Grid
from bench.goodput.sources import Source
from bench.goodput.teller import Teller
from bench.goodput.variants import Variant
from bench.goodput.venue import THIS_MACHINE, Venue
from bench.goodput.visit import typical_of
from cluster.workload.slo import IdlePoint, IdleTimes

TARGETS = (0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Plan:
    """variants: of each deployment. references: see `variants.references`."""

    experiment: Experiment
    sources: Sequence[Source]
    variants: Mapping[str, Sequence[Variant]]
    references: Sequence[Variant]


async def measure_rounds(
    plan: Plan, record: Record, teller: Teller, venue: Venue = THIS_MACHINE
) -> dict[str, list[Curve]]:
    """The curves by workload, all measured. Raises MeasurementError."""
    rounds = plan.experiment.measure.rounds
    targets = TARGETS if plan.experiment.measure.search_99 else TARGETS[:1]
    teller.expect(len(plan.references) + rounds * len(plan.sources) * len(plan.variants))
    idles = await measure_idle_times(plan.references, plan.sources, record, teller, venue)
    curves = {source.name: curves_of(plan, source, idles[source.name]) for source in plan.sources}
    for number in range(rounds):
        for source in plan.sources:
            rng = random.Random(f"{number} {source.name}")
            for name in rng.sample(list(plan.variants), len(plan.variants)):
                mine = [curve for curve in curves[source.name] if curve.variant.deployment == name]
                going_on = mine if number == 0 else best_of(mine, record.points, {0})
                with teller.part(f"round {number + 1} of {rounds}, {source.name}, {name}") as tell:
                    for index, curve in enumerate(going_on):
                        rival = _best_rate(going_on[:index], record.points) if number == 0 else None
                        await measure_visit(
                            [curve],
                            number,
                            plan.experiment,
                            record,
                            teller.line,
                            tell,
                            targets,
                            rival_rate=rival,
                            start_rate=_start_rate(curves[source.name], record.points),
                            venue=venue,
                        )
    return curves


def curves_of(plan: Plan, source: Source, idle: Idle) -> list[Curve]:
    """Of all variants under one workload."""
    limits = idle.limits(source.slo)
    return [
        Curve(source, variant, limits, idle.median)
        for variants in plan.variants.values()
        for variant in variants
    ]


def best_of(curves: Sequence[Curve], points: Sequence[Point], rounds: set[int] | None = None) -> list[Curve]:
    """For each target the one with the greatest goodput; one, if it is the same. curves: all measured."""
    best = [max(curves, key=lambda curve: curve.figure(points, target, rounds).value) for target in TARGETS]
    return list({id(curve): curve for curve in best}.values())


def _best_rate(curves: Sequence[Curve], points: Sequence[Point]) -> float | None:
    """The highest rate that one of them serves at 90 % in the first round; None if there is none."""
    measured = [curve for curve in curves if curve.of(points)]
    values = [curve.figure(points, TARGETS[0], {0}).value * curve.variant.devices for curve in measured]
    return max(values, default=0.0) or None


def _start_rate(curves: Sequence[Curve], points: Sequence[Point]) -> float | None:
    """The highest rate that one of them serves at 90 %, or the lowest that was measured, if that was too much
    for all; None if there is none."""
    rates = [point.rate for curve in curves for point in curve.of(points)]
    return _best_rate(curves, points) or min(rates, default=None)


async def measure_idle_times(
    references: Sequence[Variant],
    sources: Sequence[Source],
    record: Record,
    teller: Teller,
    venue: Venue = THIS_MACHINE,
) -> dict[str, Idle]:
    """By workload. Raises MeasurementError."""
    typicals: dict[str, Typical] = {source.name: typical_of(source) for source in sources}
    for reference in references:
        known = {
            (line["workload"], tuple(line["lengths"]), line["answer"])
            for line in record.others("idle")
            if line["reference"] == reference.deployment
        }
        missing = [
            source
            for source in sources
            if (source.name, typicals[source.name].lengths, typicals[source.name].answer) not in known
        ]
        with teller.part(f"requests alone, {reference.deployment}") as tell:
            if missing:
                async with venue.visiting(reference.config, tell) as visit:
                    for source in missing:
                        typical = typicals[source.name]
                        times = await visit.idle_times(source, typical, tell)
                        line = {
                            "workload": source.name,
                            "reference": reference.deployment,
                            "lengths": list(typical.lengths),
                            "answer": typical.answer,
                            "times": times.to_json(),
                        }
                        record.add("idle", line)
                        teller.line(f"{source.name}, alone on {reference.deployment}: {_said(times)}")
    return {name: idle_of(record, name, typical) for name, typical in typicals.items()}


def idle_of(record: Record, workload: str, typical: Typical) -> Idle:
    """What has been measured of it."""
    found: dict[str, IdleTimes] = {}
    for line in record.others("idle"):
        if (line["workload"], tuple(line["lengths"]), line["answer"]) == (
            workload,
            typical.lengths,
            typical.answer,
        ):
            found[line["reference"]] = IdleTimes(
                [IdlePoint(one["prompt_tokens"], one["ttft_s"], one["tpot_s"]) for one in line["times"]]
            )
    return Idle(typical, found)


async def measure_visit(
    curves: Sequence[Curve],
    number: int,
    experiment: Experiment,
    record: Record,
    line: Callable[[str], None],
    tell: Callable[[str], None],
    targets: Sequence[float] = TARGETS,
    rival_rate: float | None = None,
    start_rate: float | None = None,
    venue: Venue = THIS_MACHINE,
) -> None:
    """One round of one variant, for all of the curves: of one workload, and of a policy that does not look at
    limits if they have several. rival_rate, start_rate: see
    Curve.next_place. Does not start it if nothing is missing.
    Raises MeasurementError."""
    measure = experiment.measure

    def missing() -> tuple[Curve, int] | None:
        setting = curves[0].setting
        own = [point for point in record.points if point.of == setting and point.round == number]
        if len(curves) == 1:
            own = curves[0].of(own)
        if len(own) >= measure.max_points * len(curves):
            return None
        for curve in curves:
            place = curve.next_place(record.points, number, measure, targets, rival_rate, start_rate)
            if place is not None:
                return curve, place
        return None

    if missing() is None:
        return
    first = curves[0]
    variant, limits = first.variant, first.limits
    async with venue.visiting(variant.under(limits), tell) as visit:
        while (found := missing()) is not None:
            _, place = found
            rate = Grid(measure.step).rate(place)

            def show(said: str, rate: float = rate) -> None:
                tell(f"{variant.setting or variant.policy}, {rate:.3g}/s: {said}")

            duration_s, rows, said = await visit.run_at(first.source, rate, number, limits, measure, show)
            point = Point(first.setting, number, place, rate, limits, duration_s, rows, said)
            record.add_point(point)
            line(
                f"round {number + 1}, {first.source.name}, {variant.name}, {rate:.3g}/s: "
                f"{point.judged(limits).attainment:.1%} of {len(rows)} good"
            )


def _said(times: IdleTimes) -> str:
    return ", ".join(
        f"{point.prompt_tokens} tokens {point.ttft_s * 1000:.0f} ms and {point.tpot_s * 1000:.1f} ms a token"
        for point in times.points
    )
