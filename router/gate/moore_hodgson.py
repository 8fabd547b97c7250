"""Whom to give up when not all can be on time (J. M. Moore 1968, with the rule of T. J. Hodgson: An n job,
one machine sequencing algorithm for minimizing the number of late jobs)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Hold(IntEnum):
    """Who is given up for whom: nobody while there is one of a lower hold to give up."""

    LOOSE = 0
    PLAIN = 1
    GUARDED = 2


@dataclass(frozen=True, slots=True)
class Job:
    """work_s: what it takes one machine. due: when it has to be done."""

    work_s: float
    due: float
    hold: Hold = Hold.PLAIN


def given_up(jobs: Sequence[Job], start: float, rate: float = 1.0) -> tuple[set[int], float]:
    """Indices of the jobs to give up so that all others are done when they are due, and the work of these.

    jobs: earliest due first. start: when the first of them can begin. rate: work that all machines together
    do per second.

    Jobs are taken in this order; when one would overrun, the largest so far is given up. So those that are
    left are as many as possible and take as little as possible: on one machine, with all held alike, no
    choice keeps more. The work of several machines is taken to be spread evenly over them.
    """
    lost: set[int] = set()
    largest: list[list[tuple[float, int]]] = [[] for _ in Hold]
    held_s = [0.0] * len(Hold)  # work that is kept, by hold
    for index, job in enumerate(jobs):
        if start + job.work_s > job.due:
            lost.add(index)
            continue
        hold = job.hold
        if hold is Hold.GUARDED and _done(start, held_s[hold], job, rate) > job.due:
            hold = Hold.PLAIN  # not even giving up all the others would help
        heapq.heappush(largest[hold], (-job.work_s, index))
        before_s = sum(held_s)
        held_s[hold] += job.work_s
        while _done(start, before_s, job, rate) > job.due:
            lowest = next(one for one in Hold if largest[one])
            size, victim = heapq.heappop(largest[lowest])
            lost.add(victim)
            held_s[lowest] += size
            before_s += size
            if victim == index:
                break
    return lost, max(0.0, sum(held_s))


def _done(start: float, before_s: float, job: Job, rate: float) -> float:
    return start + before_s / rate + job.work_s
