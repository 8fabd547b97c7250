"""Whom to give up when not all can be on time (J. M. Moore 1968, with the rule of T. J. Hodgson: An n job,
one machine sequencing algorithm for minimizing the number of late jobs)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

LOOSE, PLAIN, FIRMEST = 0, 1, 33
"""Holds: nobody is given up while there is one of a lower hold to give up. Those above PLAIN are guarded."""


@dataclass(frozen=True, slots=True)
class Job:
    """work_s: what it takes one machine. start_by: when it has to begin. hold: from LOOSE to FIRMEST."""

    work_s: float
    start_by: float
    hold: int = PLAIN


def given_up(jobs: Sequence[Job], start: float, rate: float = 1.0) -> tuple[set[int], float]:
    """Indices of the jobs to give up so that all others begin in time, and the work of these.

    jobs: by when they have to be done, earliest first. start: when the first of them can begin. rate: work
    that all machines together do per second.

    Jobs are taken in this order; when one would be late, the largest so far is given up. So those that are
    left are as many as possible and take as little as possible: on one machine, with all held alike, no
    choice keeps more. The work of several machines is taken to be spread evenly over them.
    """
    lost: set[int] = set()
    weakest: list[tuple[int, float, int]] = []  # of those that are kept, the next to be given up first
    kept_s = [0.0] * (FIRMEST + 1)  # their work, by hold
    before_s = 0.0
    for index, job in enumerate(jobs):
        room_s = (job.start_by - start) * rate  # for work before it
        if room_s < 0:
            lost.add(index)
            continue
        hold = job.hold
        if hold > PLAIN and sum(kept_s[hold:]) > room_s:
            hold = PLAIN  # not even giving up all that may be given up for it would help
        heapq.heappush(weakest, (hold, -job.work_s, index))
        kept_s[hold] += job.work_s
        while before_s > room_s:
            victim_hold, size, victim = heapq.heappop(weakest)
            lost.add(victim)
            kept_s[victim_hold] += size
            if victim == index:
                break
            before_s += size
        else:
            before_s += job.work_s
    return lost, max(0.0, before_s)
