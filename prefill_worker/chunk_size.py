"""How many prompt tokens a step takes where it is known how urgent they are. A core.

Chunks cost more than a prompt in one go, for each step has a price of its own, and buy the chance that
another prompt goes first after each of them. So:

  - Who is on time but has little slack is read in steps as large as they can be. Nobody who comes now is
    likely to have an earlier deadline, and whoever has one loses little.
  - Who has slack to spare, and who is late anyway, is read in the smallest steps that cost hardly more
    (EFFICIENCY): of a GPU as many tokens as fill it, of a CPU core some hundred.
  - Who is late and goes first all the same, because it is the oldest, keeps nobody else from being on time:
    n* = max n: t_P(n) <= least positive slack of the others that wait. (They wait for one another, too: the
    slack of each is what is left when those before it are read.)
  - What room there is in a step goes to the next prompts up to the same efficient size. It saves them a step
    of their own, but delays the first: by half of its slack at most.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from engine.latency import LatencyModel, OnlineLatency
from engine.urgency import Urgency, slack_s

EFFICIENCY = 1.05
"""A prompt of a largest step costs at most so much of that step in efficient ones."""

MIN_CHUNK_TOKENS = 32
"""Whatever the others' slack: a step of fewer is nearly all price and no progress."""


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
    there is room left."""

    first: int
    together: int


class ChunkSizes:
    """latency: of this worker's steps; unknown, all steps are as large as they can be."""

    def __init__(self, latency: OnlineLatency, max_batch_tokens: int) -> None:
        self._latency = latency
        self._most = max_batch_tokens
        model = latency.model
        bound = -EFFICIENCY * model.prefill_s(max_batch_tokens)
        sizes = range(1, max_batch_tokens)
        # Which is max_batch_tokens if none below it will do. Costs fall, so their negatives rise.
        self._efficient = 1 + bisect_left(
            sizes, bound, key=lambda size: -_in_chunks_s(model, max_batch_tokens, size)
        )
        if not model.is_known:
            self._efficient = max_batch_tokens

    def needs_s(self, num_left: int, num_before: int) -> float:
        """How long so many tokens after so many others will take."""
        return self._latency.corrected_s(self._latency.model.prefill_s(num_left, num_before))

    def step(self, first: Waiting, others: Iterable[Waiting], now: float) -> StepSize:
        """others: in their order."""
        slack = slack_s(first.urgency, first.needs_s, now)
        if first.urgency is None or first.urgency.deadline_s is None:
            return StepSize(self._most, self._efficient)
        if slack < 0:
            most = self._efficient
            if (least := _least_positive_slack_s(others, now)) is not None:
                floor = min(MIN_CHUNK_TOKENS, most)
                most = max(floor, min(most, self._most_within(least, first.num_before)))
            return StepSize(most, most)
        within = self._most_within(first.needs_s + slack / 2, first.num_before)
        most = self._most if slack < first.needs_s else self._efficient
        return StepSize(most, min(self._efficient, within))

    def _most_within(self, limit_s: float, num_before: int) -> int:
        """Tokens that a step computes within limit_s, most of the time; 0 if it computes none."""
        prefill_s, latency = self._latency.model.prefill_s, self._latency
        return bisect_right(
            range(1, self._most + 1),
            limit_s / latency.margin,
            key=lambda count: latency.corrected_s(prefill_s(count, num_before)),
        )


def _in_chunks_s(model: LatencyModel, num_tokens: int, size: int) -> float:
    """How long a prompt takes in chunks, each of which looks back at all before it."""
    starts = range(0, num_tokens, size)
    return math.fsum(model.prefill_s(min(size, num_tokens - start), start) for start in starts)


def _least_positive_slack_s(others: Iterable[Waiting], now: float) -> float | None:
    """How long all who are on time can wait; None if nobody is."""
    least: float | None = None
    for waiting in others:
        slack = slack_s(waiting.urgency, waiting.needs_s, now)
        now += waiting.needs_s  # for those behind it
        if slack >= 0 and (least is None or slack < least):
            least = slack
    return least
