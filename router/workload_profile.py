"""What has come lately: how often, how long, how much of it was in prefix caches, and whether that changes.
A core.

Time goes in windows. The last few are what is lately; those before them are what it is held against. A drift
is a difference that chance does not make, however often one looks (tests at less than one in ten thousand),
and that is large enough to matter to a plan.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate

WINDOW_S = 60.0
_MOST_WINDOWS = 60
_RECENT = 5
_SAMPLE = 1000
"""Latest answers whose lengths are kept, each with its prompt's."""

_EDGES = tuple(round(2 ** (power / 4)) for power in range(81))
_SIGMAS = 4.0
"""Between two means, in standard errors; generous, as windows of real traffic are not normal."""
_KS = 2.4
"""Kolmogorov and Smirnov's coefficient at one in fifty thousand."""
_LEAST_RATIO, _LEAST_DISTANCE, _LEAST_SHARE = 1.25, 0.1, 0.05
"""What matters to a plan: of rates, between distributions of lengths, and of shares that caches save."""


class Trait(StrEnum):
    """What of a workload may drift."""

    RATE = "rate"
    PROMPT = "prompt"
    ANSWER = "answer"
    HITS = "hits"


@dataclass(frozen=True, slots=True)
class Drift:
    """before, now: means: requests/s, tokens, or a share."""

    trait: Trait
    before: float
    now: float


@dataclass(frozen=True, slots=True)
class Seen:
    """Of the last windows, or of all if there are fewer. seconds: how long that is. rate: requests/s, refused
    ones too. hit_share: of prompt tokens, those that were in a prefix cache. shapes: prompt and answer in
    tokens, of the latest answers. latest_rate, num_latest: the rate of the last window and the one under way,
    and how many of the shapes, the last ones, are of them."""

    seconds: float
    rate: float
    hit_share: float
    shapes: Sequence[tuple[int, int]]
    latest_rate: float
    num_latest: int


@dataclass(slots=True)
class _Window:
    """arrivals: of requests, refused ones too. Of complete ones: prompts, answers: how many by bin of length;
    the others are sums of tokens."""

    arrivals: int = 0
    prompts: Counter[int] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cached_tokens: int = 0

    @property
    def ended(self) -> int:
        return self.prompts.total()

    @property
    def hit_share(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class WorkloadProfile:
    """Told of every request when it comes, and when its answer is complete. All times in seconds on one
    clock. Bounded in memory."""

    def __init__(self, now: float) -> None:
        self._began = now
        self._current = _Window()
        self._windows: deque[_Window] = deque(maxlen=_MOST_WINDOWS)
        self._shapes: deque[tuple[int, int]] = deque(maxlen=_SAMPLE)
        # Of the windows that are over; None if that has to be reckoned again.
        self._drifts: list[Drift] | None = []

    def arrived(self, now: float) -> None:
        """A request, whatever becomes of it."""
        self._advance(now)
        self._current.arrivals += 1

    def ended(self, now: float, prompt_tokens: int, answer_tokens: int, cached_tokens: int) -> None:
        """An answer is complete. cached_tokens: of the prompt."""
        self._advance(now)
        window = self._current
        window.prompts[_bin(prompt_tokens)] += 1
        window.answers[_bin(answer_tokens)] += 1
        window.prompt_tokens += prompt_tokens
        window.answer_tokens += answer_tokens
        window.cached_tokens += min(cached_tokens, prompt_tokens)
        self._shapes.append((prompt_tokens, answer_tokens))

    def seen(self, now: float) -> Seen:
        """What a plan is made for."""
        self._advance(now)
        windows = [*list(self._windows)[-_RECENT:], self._current]
        seconds = WINDOW_S * (len(windows) - 1) + now - self._began
        arrivals = sum(window.arrivals for window in windows)
        prompts = sum(window.prompt_tokens for window in windows)
        cached = sum(window.cached_tokens for window in windows)
        latest = windows[-2:]
        latest_s = WINDOW_S * (len(latest) - 1) + now - self._began
        return Seen(
            seconds,
            arrivals / seconds if seconds > 0 else 0.0,
            cached / prompts if prompts else 0.0,
            tuple(self._shapes),
            sum(window.arrivals for window in latest) / latest_s if latest_s > 0 else 0.0,
            min(sum(window.ended for window in latest), len(self._shapes)),
        )

    def drifts(self, now: float) -> list[Drift]:
        """How the last windows differ from those before them; none while there are too few."""
        self._advance(now)
        if self._drifts is None:
            self._drifts = self._new_drifts()
        return self._drifts

    def _new_drifts(self) -> list[Drift]:
        windows = list(self._windows)
        before, recent = windows[:-_RECENT], windows[-_RECENT:]
        if len(before) < _RECENT:
            return []
        found = (
            _of_rate(before, recent),
            _of_lengths(Trait.PROMPT, before, recent),
            _of_lengths(Trait.ANSWER, before, recent),
            _of_hits(before, recent),
        )
        return [one for one in found if one is not None]

    def _advance(self, now: float) -> None:
        passed = int((now - self._began) // WINDOW_S)
        if passed <= 0:
            return
        self._began += passed * WINDOW_S
        self._windows.append(self._current)
        for _ in range(min(passed - 1, _MOST_WINDOWS)):  # in which nothing came
            self._windows.append(_Window())
        self._current = _Window()
        self._drifts = None


def _bin(tokens: int) -> int:
    return bisect_right(_EDGES, tokens)


def _of_rate(before: Sequence[_Window], recent: Sequence[_Window]) -> Drift | None:
    """Arrivals may come in bursts, so their scatter is taken from the windows; it is Poisson's at least."""
    drift = _of_means(
        Trait.RATE, [one.arrivals for one in before], [one.arrivals for one in recent], poisson=True
    )
    if drift is None:
        return None
    low, high = sorted((drift.before, drift.now))
    if high < _LEAST_RATIO * low:
        return None
    return Drift(drift.trait, drift.before / WINDOW_S, drift.now / WINDOW_S)


def _of_hits(before: Sequence[_Window], recent: Sequence[_Window]) -> Drift | None:
    shares = [[one.hit_share for one in windows if one.ended] for windows in (before, recent)]
    if min(map(len, shares)) < 2:
        return None
    drift = _of_means(Trait.HITS, *shares, poisson=False)
    return drift if drift is not None and abs(drift.now - drift.before) >= _LEAST_SHARE else None


def _of_lengths(trait: Trait, before: Sequence[_Window], recent: Sequence[_Window]) -> Drift | None:
    """Kolmogorov and Smirnov's test of two samples, on bins."""
    counts, means = [], []
    for windows in (before, recent):
        total = Counter[int]()
        for window in windows:
            total.update(window.prompts if trait is Trait.PROMPT else window.answers)
        tokens = sum(
            window.prompt_tokens if trait is Trait.PROMPT else window.answer_tokens for window in windows
        )
        if not total:
            return None
        counts.append(total)
        means.append(tokens / total.total())
    one, other = (_cumulated(total) for total in counts)
    distance = max(abs(left - right) for left, right in zip(one, other, strict=True))
    sizes = [total.total() for total in counts]
    chance = _KS * math.sqrt(sum(sizes) / (sizes[0] * sizes[1]))
    return Drift(trait, *means) if distance > max(chance, _LEAST_DISTANCE) else None


def _cumulated(counts: Counter[int]) -> list[float]:
    total = counts.total()
    return [count / total for count in accumulate(counts[number] for number in range(len(_EDGES) + 1))]


def _of_means(
    trait: Trait, before: Sequence[float], recent: Sequence[float], *, poisson: bool
) -> Drift | None:
    """Welch's test. poisson: the values are counts."""
    (one, one_error), (other, other_error) = (
        _mean_and_error(values, poisson=poisson) for values in (before, recent)
    )
    error = math.sqrt(one_error + other_error)
    return Drift(trait, one, other) if abs(one - other) > _SIGMAS * error else None


def _mean_and_error(values: Iterable[float], *, poisson: bool) -> tuple[float, float]:
    """And the square of the mean's standard error."""
    values = list(values)
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    if poisson:
        variance = max(variance, mean, 1.0)
    return mean, variance / len(values)
