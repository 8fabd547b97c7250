"""How long a worker will be busy with its prompts, and what of that goes before a new one. A core.

A snapshot says how many prompt tokens are left; its own ledger tells the router how long those take that it
placed, so others' are counted at the same rate, or at the worker's usual one. From then on the backlog drains
as time passes, and grows with every prompt that is placed.

Tokens of the step under way are left as long as it is, and a step may take longer than it is from one
snapshot to the next. So what is left is reckoned from when that step began: the same moment as before if no
token has been read since, and else by what was expected, one since the last snapshot that is no longer ago
than steps take.

If snapshots are late, it drains no further than the router's own prompts allow: those whose first token has
not come are not read, but for the one at work, or for as much as one step computes. It never counts more than
these and what others had at the last snapshot.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from engine.sequence import RequestKey


@dataclass(slots=True)
class _Prompt:
    tokens: int
    read_s: float
    order: tuple[int, float]  # of workers that are told how urgent prompts are: the least goes first
    deadline: float
    seen: bool = False


class ReadLedger:
    """Prompts that this router placed on one worker and whose first token has not come."""

    def __init__(self) -> None:
        self._prompts: dict[RequestKey, _Prompt] = {}
        self._own_s = 0.0
        self._seen_s = 0.0
        self._seen_tokens = 0
        # Of other routers at the last snapshot; all that was left then and was placed since; when it is done.
        self._others_s = 0.0
        self._known_s = 0.0
        self._until = -math.inf
        # What the last snapshot said, when it came, and when the step began that was under way then.
        self._queue_tokens = -1
        self._told_at = self._step_began = -math.inf
        # As `_sort` left it: the prompts' order, how long those behind the first i take together, and by when
        # these would have to be done so that each of them is on time.
        self._sorted = True
        self._orders: list[tuple[int, float]] = []
        self._behind_s: list[float] = [0.0]
        self._latest_end: list[float] = [math.inf]
        self._largest_s = 0.0

    def __len__(self) -> int:
        return len(self._prompts)

    def add(
        self, key: RequestKey, tokens: int, read_s: float, priority: int, deadline: float, now: float
    ) -> None:
        """A prompt of so many tokens is placed here, which takes `read_s` to read."""
        self._prompts[key] = _Prompt(tokens, read_s, (-priority, deadline), deadline)
        self._own_s += read_s
        self._known_s += read_s
        self._until = max(self._until, now) + read_s
        self._sorted = False

    def remove(self, key: RequestKey) -> None:
        """It is read, or waits no longer; one that is not here is ignored."""
        prompt = self._prompts.pop(key, None)
        if prompt is None:
            return
        if prompt.seen:
            self._seen_tokens -= prompt.tokens
            self._seen_s = self._seen_s - prompt.read_s if self._seen_tokens > 0 else 0.0
        self._own_s = self._own_s - prompt.read_s if self._prompts else 0.0
        self._sorted = False

    def snapshot(
        self, queue_tokens: int, seen: Iterable[RequestKey], token_s: float, step_s: float, now: float
    ) -> None:
        """The worker has so many prompt tokens left to read, `seen` of ours for the first time among them.

        token_s: how long each takes of which nothing else is known. step_s: how long steps took of late that
        read prompts.
        """
        seen_before = self._seen_tokens
        for key in seen:
            if (prompt := self._prompts.get(key)) is not None:
                prompt.seen = True
                self._seen_s += prompt.read_s
                self._seen_tokens += prompt.tokens
        came_tokens = self._seen_tokens - seen_before
        unseen_s = max(0.0, self._own_s - self._seen_s)
        own_tokens = min(queue_tokens, self._seen_tokens)
        left_s = self._seen_s * own_tokens / self._seen_tokens if own_tokens > 0 else 0.0
        self._others_s = (queue_tokens - own_tokens) * token_s
        self._known_s = left_s + self._others_s + unseen_s
        if self._others_s > 0:
            self._step_began = now
        elif 0 in (queue_tokens, self._queue_tokens) or queue_tokens != self._queue_tokens + came_tokens:
            expected_s = max(0.0, self._until - now)
            read_s = min(self._known_s - expected_s, step_s)
            self._step_began = min(now, max(self._told_at, now - read_s))
        self._until = self._step_began + self._known_s
        self._queue_tokens, self._told_at = queue_tokens, now

    def backlog_s(self, now: float, step_s: float) -> float:
        """How long the worker will be busy with what it has. step_s: how long a full step takes."""
        if not self._sorted:
            self._sort(now)
        most_s = min(self._own_s + self._others_s, self._known_s)
        least_s = min(self._own_s, self._known_s) - max(self._largest_s, step_s)
        return max(0.0, least_s, min(self._until - now, most_s))

    def ahead(self, priority: int, deadline: float, now: float, step_s: float) -> tuple[float, float]:
        """How long a new prompt waits on a worker that is told how urgent prompts are, and by how much those
        that it would go before can be delayed, each of which is on time so far (inf if there is none)."""
        backlog_s = self.backlog_s(now, step_s)
        place = bisect_right(self._orders, (-priority, deadline))
        wait_s = max(0.0, backlog_s - self._behind_s[place])
        # The step under way is not broken off: on average half of it is left.
        wait_s = max(wait_s, min(backlog_s, step_s) / 2)
        return wait_s, self._latest_end[place] - now - backlog_s

    def _sort(self, now: float) -> None:
        prompts = sorted(self._prompts.values(), key=lambda prompt: prompt.order)
        self._orders = [prompt.order for prompt in prompts]
        self._largest_s = max((prompt.read_s for prompt in prompts), default=0.0)
        self._behind_s = [*accumulate((prompt.read_s for prompt in reversed(prompts)), initial=0.0)]
        self._behind_s.reverse()
        # A prompt ends when all is done but what is behind it. Who is late already is not protected.
        ends_s = max(self._until, now)
        latest_ends = (
            latest if (latest := prompt.deadline + behind_s) >= ends_s else math.inf
            for prompt, behind_s in zip(prompts, self._behind_s[1:], strict=True)
        )
        self._latest_end = [*accumulate(reversed([*latest_ends]), min, initial=math.inf)]
        self._latest_end.reverse()
        self._sorted = True
