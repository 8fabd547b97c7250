"""In which order a worker reads prompts: as they come, unless it is told how urgent they are. A core.

Slack-EDF: the greater priority first; of these, who can still have its first token in time, the earliest
deadline first (Liu and Layland 1973), and after all of them the late ones, the shortest first. Plain EDF
collapses in overload, for it spends itself on those whose deadline has just become hopeless.

Such an order can keep somebody behind others for ever. So schedulers put the oldest first, whatever its
urgency, in every FAIR_STEPS-th step.

Who reads on after its first token (its worker was lost) has no deadline: somebody waits in the middle of an
answer, and each moment counts against the time between its tokens. It was due when it arrived. So is, first
come, first served, a prompt of which nothing is told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

FAIR_STEPS = 32
"""In overload a thirty-second of the work is the price of it that nobody waits for ever."""

SPEND_TOKENS = 4
"""What an answer is ahead of its limit is spent on steps that read prompts, as if so many tokens were left
of it."""


@dataclass(frozen=True, slots=True)
class Urgency:
    """Of a request, as its worker was told.

    deadline_s: when its first token has to be with the client, by this worker's clock; None if that is out.
    tpot_s: limit on the average time between its tokens; infinite if there is none. priority: the greater
    goes first.
    """

    deadline_s: float | None
    tpot_s: float = math.inf
    priority: int = 0


Rank: TypeAlias = tuple[int, bool, float, float]
"""What comes first has the least."""


def rank(urgency: Urgency | None, arrived_s: float, needs_s: float, now: float) -> Rank:
    """The place of a prompt among those that wait or are half done; equal ones keep the order they came in.

    needs_s: how long the part of it that is not computed will take.
    """
    priority = 0 if urgency is None else urgency.priority
    if urgency is None or urgency.deadline_s is None:
        return -priority, False, arrived_s, arrived_s
    is_late = slack_s(urgency, needs_s, now) < 0
    return -priority, is_late, needs_s if is_late else urgency.deadline_s, arrived_s


def slack_s(urgency: Urgency | None, needs_s: float, now: float) -> float:
    """How long the prompt can wait and still be in time; negative if it is late, infinite without a limit."""
    if urgency is None or urgency.deadline_s is None:
        return math.inf
    return urgency.deadline_s - now - needs_s
