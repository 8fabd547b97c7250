"""Who will decode on a worker at a time to come, and how tight a limit must be kept for them. A core.

To place by today's batch makes load swing (Qin et al. 2025, Mooncake, section 7): a request that is placed
now joins after its prompt is read, when some of the batch have ended and others, placed before it, have
arrived.

    placed --> coming --first token--> moving --next token--> decoding --> ended
                 +--- first token, if the prompt is read here ---^

Time here is counted in steps: each step gives each sequence a token, so a sequence that is expected to have
so many more tokens ends so many steps from now, however long a step takes. One that outlives what was
expected of it is expected to go on to its p90, and beyond that for half as long again as it has lived.

Other routers' sequences are what a snapshot has beyond our own; when these end is not known, and as many are
taken to come as go.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from enum import Enum, auto
from itertools import accumulate

from engine.sequence import RequestKey
from router.kv_growth import peak_growth, room_tokens
from router.placed_work import PlacedWork

_MORE_TOKENS = 16


class _State(Enum):
    COMING = auto()
    MOVING = auto()
    DECODING = auto()


@dataclass(slots=True)
class _Answer:
    work: PlacedWork
    state: _State
    context: int  # tokens, the new ones included
    emitted: int = 0
    joined_step: int = 0  # the step before its first one: it has emitted a token in each since
    emitted_before: int = 0
    end_step: float = 0.0
    is_told: bool = False  # the worker has counted its limit


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences that decode together, and their tokens of context."""

    size: int
    context: int


class WriteLedger:
    """Answers that this router placed on one worker, and what others have there."""

    def __init__(self) -> None:
        self._answers: dict[RequestKey, _Answer] = {}
        self._step = 0
        self._num_decoding = self._num_moving = 0
        self._context = self._moving_context = 0  # of those that decode, that move
        self._most_growth = 0
        self._others = Batch(0, 0)
        # Limits of all, of those that are not in a snapshot's least limit; how many have each.
        self._limits: Counter[float] = Counter()
        self._new_limits: Counter[float] = Counter()
        self._joined: list[_Answer] = []  # since the last snapshot
        self._least_tpot_s = self._ahead_s = 0.0
        # As `_sort` left it: when those that decode end, and what the contexts of the first i of them add up
        # to, had they been there from step 0 on; when the others join, and with how much context.
        self._sorted = True
        self._end_steps: list[float] = []
        self._context_sums: list[int] = [0]
        self._join_times: list[float] = []
        self._join_sums: list[int] = [0]

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, key: RequestKey, work: PlacedWork) -> None:
        """An answer will be written here."""
        self._answers[key] = _Answer(work, _State.COMING, work.context)
        self._most_growth += room_tokens(work.outputs) if work.are_learned else 0
        self._limits[work.tpot_s] += 1
        self._new_limits[work.tpot_s] += 1
        self._sorted = False

    def emitted(self, key: RequestKey, num_tokens: int) -> None:
        """Tokens of it came, whoever drew them; one that is not here is ignored."""
        answer = self._answers.get(key)
        if answer is None:
            return
        answer.emitted += num_tokens
        answer.context += num_tokens
        if answer.state is _State.DECODING:
            self._context += num_tokens
            step = answer.joined_step + answer.emitted - answer.emitted_before
            if step > self._step:
                self._step = step
        elif answer.state is _State.COMING and not answer.work.is_local:
            answer.state = _State.MOVING
            self._num_moving += 1
            self._moving_context += answer.context
            self._sorted = False
        else:
            self._leave(answer, num_tokens)
            answer.state = _State.DECODING
            answer.joined_step = self._step
            answer.emitted_before = answer.emitted
            answer.end_step = float(self._step + max(0, answer.work.outputs[1] - answer.emitted))
            self._joined.append(answer)
            self._num_decoding += 1
            self._context += answer.context
            self._sorted = False

    def remove(self, key: RequestKey) -> None:
        """It has ended, or is written elsewhere; one that is not here is ignored."""
        answer = self._answers.pop(key, None)
        if answer is None:
            return
        self._leave(answer, 0)
        self._most_growth -= room_tokens(answer.work.outputs) if answer.work.are_learned else 0
        _take(self._limits, answer.work.tpot_s)
        self._tell(answer)
        self._sorted = False

    def snapshot(self, batch: Batch, least_tpot_s: float, ahead_s: float = 0.0) -> None:
        """What the worker says of who decodes there: the tightest of what they can afford for each token to
        come, 0 if there is no limit that it knows of, and how far that one is ahead of it."""
        for answer in self._joined:
            self._tell(answer)
        self._joined.clear()
        # Of those that move some may be in the batch, though no token of theirs has come: what is in doubt
        # counts as ours.
        others = max(0, batch.size - self._num_decoding - self._num_moving)
        own_context = self._context + self._moving_context
        context = max(0, batch.context - own_context) if others else 0
        self._others = Batch(others, context)
        self._least_tpot_s = least_tpot_s
        self._ahead_s = ahead_s

    @property
    def now(self) -> Batch:
        """Who decodes, or is on the way from a prefill worker."""
        return Batch(
            self._num_decoding + self._num_moving + self._others.size,
            self._context + self._moving_context + self._others.context,
        )

    @property
    def ahead_s(self) -> float:
        """What those who decode are ahead of their limits, as of the last snapshot: who has joined since, or
        is on the way, is not."""
        return 0.0 if self._joined or self._num_moving else self._ahead_s

    def after(self, in_s: float, step_s: float, now: float) -> Batch:
        """Who will decode `in_s` from now, if each step takes `step_s`."""
        if not self._sorted or (self._end_steps and self._end_steps[0] <= self._step):
            self._sort()
        step = self._step + (round(in_s / step_s) if step_s > 0 else 0)
        gone = bisect_right(self._end_steps, step)
        joined = bisect_right(self._join_times, now + in_s)
        going_on = len(self._end_steps) - gone
        context = self._context_sums[-1] - self._context_sums[gone] + going_on * step
        return Batch(
            going_on + joined + self._others.size,
            context + self._join_sums[joined] + self._others.context,
        )

    def outgrows(self, free_tokens: int, context: int, tokens: int) -> bool:
        """Whether the KV of those here, of those who come and of another answer will need more than
        `free_tokens` of new room before some have ended, if each writes its `room_tokens`. context: tokens
        that the other one holds already; tokens: that it will write. Other routers' answers,
        and those whose length nobody can tell, take as much as they give back."""
        if self._most_growth + tokens <= free_tokens:
            return False
        known = (one for one in self._answers.values() if one.work.are_learned)
        answers = [(max(1, room_tokens(one.work.outputs) - one.emitted), one.context) for one in known]
        return peak_growth([*answers, (tokens, context)]) > free_tokens

    def limit_s(self, least_s: float) -> float:
        """The tightest limit that somebody has on the time for each token to come; inf if nobody has one.

        For those that decode the worker knows it best, as it depends on how they fared so far; of those it
        does not know yet their own limit counts. least_s: what no step is below. Who needs that is behind,
        and may never catch up; the limits that requests came with count then.
        """
        if self._least_tpot_s >= least_s and self._least_tpot_s > 0:
            return min(self._least_tpot_s, min(self._new_limits, default=math.inf))
        return min(self._limits, default=math.inf)

    def _leave(self, answer: _Answer, num_new: int) -> None:
        """The answer leaves the state that it is in. num_new: of its tokens, those not in any sum yet."""
        if answer.state is _State.MOVING:
            self._num_moving -= 1
            self._moving_context -= answer.context - num_new
        elif answer.state is _State.DECODING:
            self._num_decoding -= 1
            self._context -= answer.context

    def _tell(self, answer: _Answer) -> None:
        if not answer.is_told:
            answer.is_told = True
            _take(self._new_limits, answer.work.tpot_s)

    def _sort(self) -> None:
        decoding: list[_Answer] = []
        coming: list[tuple[float, int]] = []
        for answer in self._answers.values():
            if answer.state is _State.DECODING:
                if answer.end_step <= self._step:
                    answer.end_step = float(self._step + _tokens_more(answer))
                decoding.append(answer)
            elif answer.state is _State.MOVING:
                coming.append((-math.inf, answer.context))
            else:
                coming.append((answer.work.joins_at, answer.context))
        decoding.sort(key=lambda answer: answer.end_step)
        self._end_steps = [answer.end_step for answer in decoding]
        self._context_sums = [*accumulate((answer.context - self._step for answer in decoding), initial=0)]
        coming.sort()
        self._join_times = [at for at, _ in coming]
        self._join_sums = [*accumulate((context for _, context in coming), initial=0)]
        self._sorted = True


def _tokens_more(answer: _Answer) -> int:
    """How many tokens are expected of an answer that has outlived what was expected of it."""
    high = answer.work.outputs[2]
    more = high - answer.emitted if answer.emitted < high else answer.emitted // 2 + _MORE_TOKENS
    return max(1, min(more, answer.work.most_outputs - answer.emitted))


def _take(counter: Counter[float], value: float) -> None:
    counter[value] -= 1
    if counter[value] <= 0:
        del counter[value]
