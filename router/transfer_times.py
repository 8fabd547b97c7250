"""How long hand-offs keep requests waiting, learned from what decode workers report. A core.

What counts is what is not hidden behind the prefill (StageTimes.transfer_s). All pairs together give a line,
alpha + beta * tokens, by least squares with forgetting; each pair a factor to it, for pairs differ by the
links between them. A pair on which nothing has been placed yet is taken to need no time (optimism in the face
of uncertainty), so each is tried: of a near pair that is linked after a far one the line says nothing good.
"""

from __future__ import annotations

from collections import OrderedDict

from router.pair_table import Pair

_LEAST_S = 1e-6
_MOST_STEPS = 4


class TransferTimes:
    """A core. Bounded in memory: of all pairs those that were used last."""

    def __init__(self, forgetting: float = 0.995, rate: float = 0.1, max_pairs: int = 4096) -> None:
        """forgetting: weight of a hand-off against the next. rate: how far one moves its pair's factor."""
        self._forgetting = forgetting
        self._rate = rate
        self._max_pairs = max_pairs
        self._factors: OrderedDict[Pair, float] = OrderedDict()
        # Decayed sums of 1, n, s, n * n, n * s over hand-offs of n tokens that took s seconds.
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        self._alpha_s = self._beta_s = 0.0
        self.second_token_s = 0.0
        """By how much later than a decode step the second token of an answer comes that was handed over, all
        told: what of the transfer is not hidden, the wait for a step, and messages. 0 while nothing is
        known."""

    def __len__(self) -> int:
        """Pairs that are remembered."""
        return len(self._factors)

    def placed(self, pair: Pair) -> None:
        """A request goes that way: from now on the pair is taken to be like all together, until it says
        more."""
        if pair not in self._factors:
            self._remember(pair, 1.0)

    def observe(self, pair: Pair, num_tokens: int, seconds: float) -> None:
        """A request of which so many tokens travelled had to wait so long for them."""
        if not 0 <= seconds < float("inf"):
            return
        line_s = self._line_s(num_tokens)
        factor = self._factors.pop(pair, 1.0)
        if line_s > _LEAST_S:
            factor += self._rate * (seconds / line_s - factor)
        self._remember(pair, min(10.0, max(0.1, factor)))
        new = (1.0, num_tokens, seconds, num_tokens * num_tokens, num_tokens * seconds)
        one, n, s, nn, ns = (
            self._forgetting * old + value for old, value in zip(self._sums, new, strict=True)
        )
        self._sums = (one, n, s, nn, ns)
        spread = one * nn - n * n
        # Where all were of about one length, their mean says all that there is to say.
        beta = (one * ns - n * s) / spread if spread > 1e-3 * one * nn else 0.0
        # Neither is negative: longer transfers do not take less.
        self._beta_s = min(max(0.0, beta), s / n) if n > 0 else 0.0
        self._alpha_s = max(0.0, (s - self._beta_s * n) / one)

    def observe_second_token(self, seconds: float, step_s: float) -> None:
        """It came so much later than a decode step, which takes step_s. Of what is beyond a few steps a
        hand-off is not the reason."""
        seconds = min(max(0.0, seconds), _MOST_STEPS * step_s)
        self.second_token_s += self._rate * (seconds - self.second_token_s)

    def expect_s(self, pair: Pair, num_tokens: int) -> float:
        """How long a request of which so many tokens travel waits for them; 0 while nothing is known.

        Where there are more pairs than are remembered, one of which nothing is known may have been used."""
        unknown = 0.0 if len(self._factors) < self._max_pairs else 1.0
        return self._line_s(num_tokens) * self._factors.get(pair, unknown)

    def _remember(self, pair: Pair, factor: float) -> None:
        self._factors[pair] = factor
        if len(self._factors) > self._max_pairs:
            self._factors.popitem(last=False)

    def _line_s(self, num_tokens: int) -> float:
        return self._alpha_s + self._beta_s * num_tokens if num_tokens > 0 else 0.0
