"""What is measured, in which order.

1. A worker's steps are profiled, alone on a core (of simulated engines: their profile is taken as it is).
2. What requests take alone gives the limits, as for `prelay bench goodput`.
3. Every deployment is brought up once, and first loaded lightly: that run says what a cluster at work adds to
   the profile (`correction.py`), and is not judged.
4. The simulator then says which rate is too much, and the deployment is measured at shares of that rate.
5. The same arrivals are simulated, with the profile alone and with what the light run taught.

What is measured is kept in a record like that of `prelay bench goodput`, and 5 needs nothing else.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from bench.accuracy.case import Case, seed_of
from bench.goodput.points import Point
from bench.goodput.record import Record
from bench.goodput.run import Plan, measure_idle_times
from bench.goodput.teller import Teller
from bench.goodput.venue import Venue
from bench.processes import Remote
from bench.simulate.twin import Correction
from cluster.config import ServeConfig
from cluster.latency_profile import read_profile
from cluster.workload.errors import BadInputError
from cluster.workload.judge import Judgement, judge
from engine.latency import LatencyModel

LIGHT = -1
"""The round of the run that is not judged."""
_LIGHT_SHARE = 0.4
_MAX_BATCH_TOKENS, _MAX_NUM_SEQS, _MAX_CONTEXT, _REPEATS = 512, 32, 1024, 3


@dataclass(frozen=True, slots=True)
class Rates:
    """given: requests/s; None for shares of what the simulator says a deployment serves at 90 %."""

    given: Sequence[float] | None
    shares: Sequence[float]


@dataclass(frozen=True, slots=True)
class Compared:
    """One rate of one case, all rounds together. of_saturation: None if the simulator knows of none.
    by_profile: simulated with nothing but the profile."""

    case: Case
    rate: float
    of_saturation: float | None
    real: Judgement
    simulated: Judgement
    by_profile: Judgement

    @property
    def is_beyond(self) -> bool:
        """Whether it is more than the deployment serves at 90 %."""
        return self.of_saturation is None or self.of_saturation > 1

    @property
    def error_points(self) -> float:
        """Of joint attainment, in hundredths."""
        return 100 * abs(self.real.attainment - self.simulated.attainment)


@dataclass(frozen=True, slots=True)
class Compare:
    """A case, what its light run taught, and its rates."""

    case: Case
    correction: Correction
    saturation: float | None
    rows: Sequence[Compared]


async def measure_accuracy(
    plan: Plan, profile: LatencyModel, rates: Rates, record: Record, teller: Teller, venue: Venue
) -> list[Compare]:
    """Of a deployment with values to try, the first is taken. Raises BadInputError, MeasurementError."""
    idles = await measure_idle_times(plan.references, plan.sources, record, teller, venue)
    measure = plan.experiment.measure
    cases = [
        Case(source, variants[0], idles[source.name].limits(source.slo), measure, profile)
        for source in plan.sources
        for variants in plan.variants.values()
    ]
    teller.expect(len(cases))
    learned: list[_Learned] = []
    for case in cases:
        with teller.part(f"{case.source.name}, {case.variant.deployment}") as tell:
            learned.append(await _measure(case, rates, record, teller.line, tell, venue))
    return [_compared(case, one, record) for case, one in zip(cases, learned, strict=True)]


async def _measure(
    case: Case,
    rates: Rates,
    record: Record,
    line: Callable[[str], None],
    tell: Callable[[str], None],
    venue: Venue,
) -> _Learned:
    """Whatever of it is not in the record. Raises BadInputError, MeasurementError."""
    learned = _learned(case, rates, record)
    todo = _missing(case, rates, record, learned)
    if todo:
        async with venue.visiting(case.variant.under(case.limits), tell) as visit:
            while todo:
                (number, rate), *todo = todo

                def show(said: str, rate: float = rate) -> None:
                    tell(f"{rate:.3g}/s: {said}")

                duration_s, rows, said = await visit.run_at(
                    case.source, rate, seed_of(number), case.limits, case.measure, show
                )
                point = Point(case.setting, number, 0, rate, case.limits, duration_s, rows, said)
                record.add_point(point)
                light = " (light, not judged)" if number == LIGHT else ""
                line(
                    f"{case.source.name}, {case.variant.name}, {rate:.3g}/s{light}: "
                    f"{point.judged(case.limits).attainment:.1%} of {len(rows)} good"
                )
                if learned is None:
                    learned = _learned(case, rates, record)
                    todo = _missing(case, rates, record, learned)
    assert learned is not None
    return learned


@dataclass(frozen=True, slots=True)
class _Learned:
    """From the light run. saturation: None if the simulator attains 90 % at no rate."""

    correction: Correction
    saturation: float | None
    rates: Sequence[float]


def _learned(case: Case, rates: Rates, record: Record) -> _Learned | None:
    """None before there was a light run. Raises BadInputError."""
    light = _points(case, record, LIGHT)
    if not light:
        return None
    correction = case.corrected(light[0])
    saturation = case.saturation(correction)
    if rates.given is not None:
        return _Learned(correction, saturation, rates.given)
    return _Learned(
        correction, saturation, [_short(share * _known(case, saturation)) for share in rates.shares]
    )


def _missing(case: Case, rates: Rates, record: Record, learned: _Learned | None) -> list[tuple[int, float]]:
    """Rounds and rates that can be measured next; all, once the light run is there. Raises BadInputError."""
    if learned is None:
        if rates.given:
            return [(LIGHT, rates.given[0])]
        return [(LIGHT, _short(_LIGHT_SHARE * _known(case, case.saturation(Correction()))))]
    return [
        (number, rate)
        for number in range(case.measure.rounds)
        for rate in learned.rates
        if not any(_same(point.rate, rate) for point in _points(case, record, number))
    ]


def _known(case: Case, saturation: float | None) -> float:
    """Raises BadInputError."""
    if saturation is None:
        raise BadInputError(
            f"{case.source.name} on {case.variant.name}: in the simulator 90 % are good at no rate, so there "
            "is nothing to take --shares of; give looser limits, or --rates"
        )
    return saturation


def _compared(case: Case, learned: _Learned, record: Record) -> Compare:
    compared = []
    for rate in learned.rates:
        points = [
            point
            for number in range(case.measure.rounds)
            for point in _points(case, record, number)
            if _same(point.rate, rate)
        ]
        duration_s = sum(point.duration_s for point in points)

        def simulated(
            correction: Correction,
            points: Sequence[Point] = points,
            rate: float = rate,
            duration_s: float = duration_s,
        ) -> Judgement:
            rows = [row for point in points for row in case.simulated(rate, seed_of(point.round), correction)]
            return judge(rows, case.slo, duration_s)

        real = judge([row for point in points for row in point.rows], case.slo, duration_s)
        of_saturation = None if learned.saturation is None else rate / learned.saturation
        compared.append(
            Compared(case, rate, of_saturation, real, simulated(learned.correction), simulated(Correction()))
        )
    return Compare(case, learned.correction, learned.saturation, compared)


def _points(case: Case, record: Record, number: int) -> list[Point]:
    return [point for point in record.points if point.of == case.setting and point.round == number]


def _short(rate: float) -> float:
    """As people write it, so that it is the same again after a resume."""
    return float(f"{rate:.3g}")


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6)


async def profile_of(config: ServeConfig, record: Record, tell: Callable[[str], None]) -> LatencyModel:
    """Of one worker alone on the last core; of simulated engines, what they were told. Raises
    MeasurementError."""
    if config.model.profile is not None:
        return read_profile(config.model.profile)
    if not record.others("profile"):
        remote = Remote(
            "profile", max(os.sched_getaffinity(0)), serve_profile, str(config.model.path),
            config.model.dtype, config.model.load,
        )  # fmt: skip
        try:
            while isinstance(said := await asyncio.to_thread(remote.take), str):
                tell(said)
        finally:
            remote.stop()  # whoever waits for its word in a thread then hears that it has ended
        record.add("profile", said)
    return LatencyModel.from_json(record.others("profile")[0]["latency"])


def serve_profile(connection: Connection, checkpoint: str, dtype: str, load: str) -> None:
    """The process that profiles: says how far it is, and at last what it found."""
    from bench.profile import ProfileSettings, run_profile

    settings = ProfileSettings(
        Path(checkpoint), Path(checkpoint).name, load, dtype, 1, "auto",
        _MAX_BATCH_TOKENS, _MAX_NUM_SEQS, _MAX_CONTEXT, _REPEATS,
    )  # fmt: skip
    found = run_profile(settings, lambda share, what: connection.send(f"{what}, {share:.0%}"))
    connection.send({"latency": found.model.to_json(), "error": found.errors()})
    connection.recv()
