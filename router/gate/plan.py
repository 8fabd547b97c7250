"""Who of those that wait is kept, who is given up, and who is late: a plan of the gate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from router.gate.fairness import Guards
from router.gate.moore_hodgson import FIRMEST, LOOSE, PLAIN, Job, given_up
from router.gate.readers import Readers
from router.gate.waiting import Waiting


@dataclass(frozen=True, slots=True)
class Plan:
    """Each by deadline."""

    kept: list[Waiting]
    given_up: list[Waiting]
    late: list[Waiting]


def make_plan(
    waiting: Sequence[Waiting], guards: Guards, readers: Readers, rate: float, first_s: float, now: float
) -> Plan:
    """waiting: by priority, then deadline. rate: work that readers do per second. first_s: work that goes
    before all of it. Gives each its hold.

    A priority has what the higher ones leave. Readers are busy for a while with what they have: how long, for
    a given request, depends on its deadline, as they go by that, too. It is asked for the first and the last
    one, and taken to grow evenly from one to the other.
    """
    late = [one for one in waiting if one.start_by < now]
    in_time = [one for one in waiting if one.start_by >= now]
    if not in_time:
        return Plan([], [], late)
    first, last = in_time[0], in_time[-1]
    least_s = readers.wait_s(first.request, now)
    most_s = least_s if first is last else max(least_s, readers.wait_s(last.request, now))
    span_s = last.due - first.due
    slope = (most_s - least_s) / span_s if span_s > 0 else 0.0
    kept: list[Waiting] = []
    lost: list[Waiting] = []
    start = now + first_s / rate
    for _, group in groupby(in_time, key=lambda one: one.by_deadline[0]):
        equals = list(group)
        for one in equals:
            one.hold = hold_of(one, guards)
        jobs = [
            Job(
                one.read_s,
                one.plan_by - min(most_s, max(least_s, least_s + (one.due - first.due) * slope)),
                one.hold,
            )
            for one in equals
        ]
        lost_ones, work_s = given_up(jobs, start, rate)
        start += work_s / rate
        for index, one in enumerate(equals):
            (lost if index in lost_ones else kept).append(one)
    return Plan(kept, lost, late)


def hold_of(one: Waiting, guards: Guards) -> int:
    if not one.can:
        return LOOSE
    need = guards.need(one.request.tenant, one.length, one.read_s)
    return PLAIN + math.ceil(need * (FIRMEST - PLAIN))
