"""How many prompt tokens a step may take beside those who decode. A core.

Sarathi-Serve (Agrawal et al. 2024, section 4.2) puts a token of everybody who decodes into each step, then as
much of the prompts as a fixed budget leaves: prompts never stall an answer. Its budget is the largest whose
steps keep the TPOT limit, found beforehand. Where limits are known here, it is found anew for each step:

    n* = max n: t_M(B, K, n) * exp(q) <= min over those who decode of S_eff

t_M is the latency of a step with B sequences of K tokens of context and n prompt tokens, exp(q) the margin
for the average of such steps (engine/latency.py), and S_eff what a sequence can afford until its next token.

TPOT is an average, over d tokens that came in `elapsed` since the first. A sequence with limit S is

    ahead = S * d - elapsed

of what it may take (behind, if negative), and with r tokens to come each may take S_eff = S + ahead / r; that
is (S * (m - 1) - elapsed) / (m - 1 - d) for an answer of m tokens. But nobody knows m: the next token may be
the last. So

  - who is ahead spends a part of that on a step (r = SPEND_TOKENS). However early the answer ends then, its
    average is within S; and what is left pays for steps that take longer than promised.
  - who is behind makes up for it within as many tokens as have come, at least CATCH_UP_TOKENS: an answer is
    likely to go on for about as long as it has.
  - who would be late even alone in its steps until max_tokens is not heard: it would slow prompts for
    nothing.

A chunk costs something however small it is: what was read of its prompt is read again, and on a device whose
decode steps are recorded a mixed one is not. A token of each prompt in every step could then make all answers
late and prompts hardly advance. So what is less than worth a chunk (`LatencyModel.least_chunk`) is saved up:
there is none until a step can afford one, or the tokens of the steps that have gone by without are worth one
together, or these are MOST_SAVED.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.latency import OnlineLatency, StepShape
from engine.urgency import SPEND_TOKENS

CATCH_UP_TOKENS = 8

MIN_CHUNK_TOKENS = 1
"""A step takes so many prompt tokens on the average even if those who decode cannot afford them, so that
prompts progress. On a CPU core each costs about a tenth of a step, so 16 would break every tight limit; where
16 cost nothing, as on a GPU, they fit anyway."""

MOST_SAVED = 8
"""Steps whose prompt tokens go into one."""

_LEAST_S = 1e-6


@dataclass(frozen=True, slots=True)
class Pace:
    """A sequence that decodes, and has a TPOT limit of tpot_s. elapsed_s: since its first token, num_drawn:
    tokens since then, most_left: those that may come yet. context: its tokens, prompt included."""

    tpot_s: float
    elapsed_s: float
    num_drawn: int
    most_left: int
    context: int

    @property
    def ahead_s(self) -> float:
        """Of its limit; negative: behind."""
        return self.tpot_s * self.num_drawn - self.elapsed_s

    @property
    def effective_s(self) -> float:
        """S_eff: how long the next token may take. Negative, if it should have come by now."""
        if self.ahead_s >= 0:
            return self.tpot_s + self.ahead_s / SPEND_TOKENS
        return self.tpot_s + self.ahead_s / min(self.most_left, max(self.num_drawn, CATCH_UP_TOKENS))

    @property
    def sustained_s(self) -> float:
        """What each token to come may take, as a positive number; what it is ahead is not counted."""
        return max(_LEAST_S, min(self.tpot_s, self.effective_s))

    @property
    def most_s(self) -> float:
        """The average time of all tokens that may come with which it still keeps its limit."""
        return self.tpot_s + self.ahead_s / self.most_left


class ChunkBudget:
    """latency: of this worker's steps; if its model is unknown, limits say nothing about chunks."""

    def __init__(self, latency: OnlineLatency, max_batch_tokens: int) -> None:
        self._latency = latency
        self._max_batch_tokens = max_batch_tokens
        # Steps since the last chunk in which somebody waited to be read, and tokens that could have been.
        self._num_without = self._saved = 0

    def tightest(self, paces: Iterable[Pace]) -> Pace | None:
        """Of those that can still keep their limit, who can afford least."""
        latency, model = self._latency, self._latency.model
        least: Pace | None = None
        least_s = 0.0
        for pace in paces:
            can_s = pace.effective_s
            is_less = least is None or can_s < least_s
            if is_less and pace.most_s >= latency.corrected_s(model.decode_s(1, pace.context)):
                least, least_s = pace, can_s
        return least

    def num_tokens(
        self, batch: int, context: int, limit_s: float | None, chunks: Sequence[tuple[int, int]]
    ) -> int:
        """Most prompt tokens beside `batch` sequences that decode with `context` tokens together. To be asked
        once for each step in which somebody wants to be computed.

        limit_s: what the step may take. chunks: (tokens left, tokens before them) of each sequence that
        is to be computed, in the order in which they get what there is.
        """
        most, fitting = self._fitting(batch, context, limit_s, chunks)
        model, cached = self._latency.model, chunks[0][1]
        worth = min(most, model.least_chunk(batch, context, cached, self._max_batch_tokens)) if batch else 1
        if fitting < worth:
            self._saved += fitting
            self._num_without += 1
            if self._saved < worth and self._num_without < MOST_SAVED:
                return 0
            fitting = min(most, max(worth, self._saved))
        self._saved = self._num_without = 0
        return fitting

    def _fitting(
        self, batch: int, context: int, limit_s: float | None, chunks: Sequence[tuple[int, int]]
    ) -> tuple[int, int]:
        """How many tokens there are, and how many of these may be in the step, one at least."""
        most = min(self._max_batch_tokens - batch, sum(left for left, _ in chunks))
        if limit_s is None or not self._latency.model.is_known:
            return most, most

        def fits(count: int) -> bool:
            return self._latency.promise_s(StepShape(_filled(chunks, count), batch, context)) <= limit_s

        if most <= MIN_CHUNK_TOKENS or fits(most):
            return most, most
        # Fewer tokens never take longer, so the limit lies between what fits and what does not.
        least, too_many = MIN_CHUNK_TOKENS, most
        while too_many - least > 1:
            middle = (least + too_many) // 2
            if fits(middle):
                least = middle
            else:
                too_many = middle
        return most, least


def _effective(pace: Pace) -> float:
    return pace.effective_s


def _filled(chunks: Sequence[tuple[int, int]], count: int) -> tuple[tuple[int, int], ...]:
    """The chunks of a step that takes `count` tokens of them."""
    filled: list[tuple[int, int]] = []
    for left, before in chunks:
        filled.append((min(left, count), before))
        count -= filled[-1][0]
        if count == 0:
            break
    return tuple(filled)
