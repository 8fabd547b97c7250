"""How many prompt tokens a step takes where it is known how urgent they are. A core.

Chunks cost more than a prompt in one go, for each step has a price of its own, and buy the chance that
another prompt goes first after each of them. So:

  - Who is on time is read in steps as large as they can be: it has the earliest deadline of all, and whoever
    comes now is likely to have a later one.
  - Who is late is read in the smallest steps that cost hardly more (EFFICIENCY): of a GPU as many tokens as
    fill it, of a CPU core some hundred. Whoever comes now goes first.
  - Who is late and goes first all the same, because it is the oldest, keeps nobody else from being on time:
    n* = max n: t_P(n) <= least positive slack of the others that wait. (They wait for one another, too: the
    slack of each is what is left when those before it are read.)
  - What room there is in a step, up to the same efficient size, goes to next prompts that end in it. It saves
    them a step of their own, but delays the first: by half of its slack at most. A part of a prompt would
    delay the first and save no step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from engine.latency import OnlineLatency
from engine.urgency import Urgency, slack_s

EFFICIENCY = 1.05
"""What is read in efficient chunks costs at most so much of what it costs in one go."""

MIN_CHUNK_TOKENS = 32
"""Whatever the others' slack: a step of fewer tokens is nearly all price and no progress."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A prompt, as far as it concerns the step. num_left: of its tokens, those to compute, num_before: those
    before them whose KV is there. needs_s: for those to compute."""

    urgency: Urgency | None
    num_left: int
    num_before: int
    needs_s: float


@dataclass(frozen=True, slots=True)
class StepSize:
    """first: most tokens of the prompt that goes first. together: with it, most tokens of the whole step, if
    there is room left. in_parts: whether others may get less of it than all they need."""

    first: int
    together: int
    in_parts: bool = False

    def has_room(self, num_tokens: int, num_left: int) -> bool:
        """Whether a step of num_tokens takes another prompt in, which has num_left to compute."""
        room = self.together - num_tokens
        return room >= (1 if self.in_parts else num_left)


class ChunkSizes:
    """latency: of this worker's steps; unknown, all steps are as large as they can be."""

    def __init__(self, latency: OnlineLatency, max_batch_tokens: int) -> None:
        self._latency = latency
        self._most = max_batch_tokens

    def needs_s(self, num_left: int, num_before: int) -> float:
        """How long so many tokens after so many others will take."""
        return self._latency.corrected_s(self._latency.model.prefill_s(num_left, num_before))

    def step(self, first: Waiting, others: Iterable[Waiting], now: float) -> StepSize:
        """others: in their order."""
        slack = slack_s(first.urgency, first.needs_s, now)
        if slack >= 0:
            within = self._most_within(first.needs_s + slack / 2, first.num_before)
            return StepSize(self._most, min(self._efficient(self._most, 0), within))
        most = self._efficient(min(first.num_left, self._most), first.num_before)
        if (least := _least_positive_slack_s(others, now)) is not None:
            floor = min(MIN_CHUNK_TOKENS, most)
            most = max(floor, min(most, self._most_within(least, first.num_before)))
        return StepSize(most, most)

    def _efficient(self, num_tokens: int, num_before: int) -> int:
        """The smallest of sizes that divide num_tokens evenly that costs hardly more than all at once."""
        if not self._latency.model.is_known:
            return num_tokens
        most_parts = max(1, num_tokens // MIN_CHUNK_TOKENS)
        bound = EFFICIENCY * self._in_parts_s(num_tokens, num_before, 1)
        # Costs rise with the number of parts.
        parts = bisect_right(
            range(1, most_parts + 1),
            bound,
            key=lambda count: self._in_parts_s(num_tokens, num_before, count),
        )
        return -(-num_tokens // max(1, parts))

    def _in_parts_s(self, num_tokens: int, num_before: int, parts: int) -> float:
        """How long tokens take in equal parts, each of which looks back at all before it."""
        size = -(-num_tokens // parts)
        prefill_s, latency = self._latency.model.prefill_s, self._latency
        return math.fsum(
            latency.corrected_s(prefill_s(min(size, num_tokens - start), num_before + start))
            for start in range(0, num_tokens, size)
        )

    def _most_within(self, limit_s: float, num_before: int) -> int:
        """Tokens that a step computes within limit_s, most of the time; 0 if it computes none."""
        prefill_s, latency = self._latency.model.prefill_s, self._latency
        return bisect_right(
            range(1, self._most + 1),
            limit_s / latency.margin,
            key=lambda count: latency.corrected_s(prefill_s(count, num_before)),
        )


def _least_positive_slack_s(others: Iterable[Waiting], now: float) -> float | None:
    """How long all who are on time can wait; None if nobody is."""
    least: float | None = None
    for waiting in others:
        slack = slack_s(waiting.urgency, waiting.needs_s, now)
        now += waiting.needs_s  # for those behind it
        if slack >= 0 and (least is None or slack < least):
            least = slack
    return least
