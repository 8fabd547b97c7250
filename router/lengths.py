"""How long answers will be, learned from those that have ended. A core.

Counts are kept in bins whose width grows with the length (8 for each doubling, so a quantile is at most 9 %
off), and halved when there are many: what was seen last counts most. An answer that was cut at its max_tokens
counts as long as it was.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from itertools import accumulate

from router.requests import Request

_MAX_TOKENS = 2**20
_BINS_PER_DOUBLING = 8
_QUANTILES = (0.1, 0.5, 0.9)


def _edges() -> tuple[int, ...]:
    """The least lengths of the bins."""
    edges: list[int] = []
    power = 0
    while (edge := round(2 ** (power / _BINS_PER_DOUBLING))) <= _MAX_TOKENS:
        if not edges or edge > edges[-1]:
            edges.append(edge)
        power += 1
    return tuple(edges)


_EDGES = _edges()
PROMPT_BINS = (512, 2048, 8192)
"""The least lengths, in tokens, of all bins of prompts but the first: those of goodput reports."""


def prompt_bin(prompt_tokens: int) -> int:
    """Which bin a prompt of so many tokens is in, from 0."""
    return bisect_right(PROMPT_BINS, prompt_tokens)


class _Histogram:
    """total: what the counts add up to, older ones at less than 1 each."""

    def __init__(self) -> None:
        self.total = 0.0
        self._counts = [0.0] * len(_EDGES)
        self._quantiles: tuple[int, int, int] | None = None

    def add(self, length: int, most: float) -> None:
        """most: when the counts add up to so much, all are halved."""
        self._counts[bisect_right(_EDGES, max(1, length)) - 1] += 1
        self.total += 1
        if self.total >= most:
            self._counts = [count / 2 for count in self._counts]
            self.total /= 2
        self._quantiles = None

    def quantiles(self, above: int) -> tuple[int, int, int] | None:
        """Of the lengths above that one, if there were any."""
        if above > 0:
            return self._quantiles_from(bisect_right(_EDGES, above))
        if self._quantiles is None:
            self._quantiles = self._quantiles_from(0)
        return self._quantiles

    def _quantiles_from(self, first: int) -> tuple[int, int, int] | None:
        sums = [*accumulate(self._counts[first:])]
        if not sums or sums[-1] <= 0:
            return None
        low, middle, high = (_length(first + bisect_left(sums, share * sums[-1])) for share in _QUANTILES)
        return low, middle, high


class OutputLengths:
    """Running quantiles of the tokens of complete answers, by tenant and bin of the prompt's length; what is
    known of all tenants stands in until a tenant has had enough of them. Bounded in memory: of tenants and
    bins, those that were seen last."""

    def __init__(self, window: int = 2000, enough: int = 20, max_kinds: int = 1024) -> None:
        """window: answers of a kind after which what was seen before counts half. enough: answers of a kind
        (tenant and bin) without which it is not believed. max_kinds: that are remembered."""
        self._window = window
        self._enough = enough
        self._max_kinds = max_kinds
        self._kinds: OrderedDict[tuple[str, int], _Histogram] = OrderedDict()
        self._bins = [_Histogram() for _ in range(len(PROMPT_BINS) + 1)]
        self._all = _Histogram()
        # A decision asks for the same request again and again.
        self._last: tuple[Request, tuple[int, int, int]] | None = None

    def __len__(self) -> int:
        """Kinds of answers that are remembered."""
        return len(self._kinds)

    def observe(self, request: Request, num_tokens: int) -> None:
        """An answer is complete, and had so many tokens."""
        bin_index = prompt_bin(len(request.prompt_token_ids))
        kind = (request.tenant, bin_index)
        known = self._kinds.get(kind)
        if known is None:
            known = self._kinds[kind] = _Histogram()
            if len(self._kinds) > self._max_kinds:
                self._kinds.popitem(last=False)
        self._kinds.move_to_end(kind)
        for histogram in (known, self._bins[bin_index], self._all):
            histogram.add(num_tokens, self._window)
        self._last = None

    def quantiles(self, request: Request) -> tuple[int, int, int]:
        """p10, p50 and p90 of the tokens that are still to come of the request's answer: at least 1 each, at
        most its tokens_left. With nothing known: its tokens_left thrice."""
        if self._last is None or self._last[0] is not request:
            self._last = request, self._look_up(request)
        return self._last[1]

    def knows(self, request: Request) -> bool:
        """Whether `quantiles` says more than what the request allows."""
        sampling = request.sampling
        if sampling.min_tokens >= sampling.max_tokens:
            return True
        return self._known(request).quantiles(len(request.answered)) is not None

    def _look_up(self, request: Request) -> tuple[int, int, int]:
        left = request.tokens_left
        emitted = len(request.answered)
        known = self._known(request).quantiles(emitted)
        if known is None:
            return max(1, left), max(1, left), max(1, left)
        least = max(1, request.sampling.min_tokens - emitted)
        low, middle, high = (max(1, min(left, max(least, length - emitted))) for length in known)
        return low, middle, high

    def _known(self, request: Request) -> _Histogram:
        bin_index = prompt_bin(len(request.prompt_token_ids))
        own = self._kinds.get((request.tenant, bin_index))
        if own is not None and own.total >= self._enough:
            return own
        of_bin = self._bins[bin_index]
        return of_bin if of_bin.total >= self._enough else self._all


def _length(bin_index: int) -> int:
    """The middle of a bin."""
    edge = _EDGES[min(bin_index, len(_EDGES) - 1)]
    after = _EDGES[bin_index + 1] if bin_index + 1 < len(_EDGES) else edge + 1
    return (edge + after - 1) // 2
