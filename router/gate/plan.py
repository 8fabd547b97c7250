"""Who of those that wait is kept, who is given up, and who is late: a plan of the gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from router.gate.fairness import Guards
from router.gate.moore_hodgson import Hold, Job, given_up
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
    before all of it. Says of each one whether it is guarded.

    A priority has what the higher ones leave. Readers are busy for a while with what they have: how long, for
    a given request, depends on its deadline, as they go by that, too. It is asked for the first and the last
    one, and taken to grow evenly from one to the other.
    """
    late = [one for one in waiting if one.start_by < now]
    in_time = [one for one in waiting if one.start_by >= now]
    if not in_time:
        return Plan([], [], late)
    first, last = in_time[0], in_time[-1]
    first_wait_s = readers.wait_s(first.request, now)
    last_wait_s = first_wait_s if first is last else readers.wait_s(last.request, now)
    slope = (last_wait_s - first_wait_s) / (last.due - first.due) if last.due > first.due else 0.0
    lowest_s, highest_s = sorted((first_wait_s, last_wait_s))
    kept: list[Waiting] = []
    lost: list[Waiting] = []
    start = now + first_s / rate
    for _, group in groupby(in_time, key=lambda one: one.request.slo.priority):
        equals = list(group)
        jobs = []
        for one in equals:
            wait_s = min(highest_s, max(lowest_s, first_wait_s + (one.due - first.due) * slope))
            jobs.append(Job(one.read_s, one.due - wait_s, _hold(one, guards)))
        lost_ones, work_s = given_up(jobs, start, rate)
        start += work_s / rate
        for index, one in enumerate(equals):
            (lost if index in lost_ones else kept).append(one)
    return Plan(kept, lost, late)


def _hold(one: Waiting, guards: Guards) -> Hold:
    if not one.can:
        return Hold.LOOSE
    one.guarded = guards.guards(one.request.tenant, one.length, one.read_s)
    return Hold.GUARDED if one.guarded else Hold.PLAIN
