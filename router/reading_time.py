"""How long a prompt takes to read in chunks, beside a batch that decodes or alone. Pure functions.

A step's time is, for chunks of one size, a line over the tokens before the chunk (engine/latency.py), so the
steps of a prompt add up like any arithmetic series: three of them say it all, however long the prompt.
"""

from __future__ import annotations

from engine.latency import OnlineLatency
from router.write_ledger import Batch

ALONE = Batch(0, 0)
_MOST_SPENDING = 16
"""Steps after which, at a quarter each, a hundredth is left."""


def reading_s(
    latency: OnlineLatency, tokens: int, cached: int, chunk: int, batch: Batch = ALONE
) -> tuple[float, int]:
    """Seconds and steps for `tokens` tokens after `cached` ones, of which each step takes `chunk`."""

    def step_s(new: int, before: int) -> float:
        return latency.corrected_s(latency.model.mixed_s(batch.size, batch.context, new, before))

    steps = -(-tokens // chunk)
    if steps <= 1:
        return step_s(tokens, cached), 1
    full = steps - 1
    first_s, last_s = step_s(chunk, cached), step_s(chunk, cached + (full - 1) * chunk)
    rest_s = step_s(tokens - full * chunk, cached + full * chunk)
    return full * (first_s + last_s) / 2 + rest_s, steps


def spending_chunk(tokens: int, chunk: int, ahead_tokens: float, spends: float) -> int:
    """The average chunk of a prompt of `tokens` tokens, of which steps take `chunk` each and besides, step
    after step, the share `spends` of what is left of `ahead_tokens`."""
    kept = 1.0
    for steps in range(1, _MOST_SPENDING + 1):
        kept *= 1 - spends
        if steps * chunk + ahead_tokens * (1 - kept) >= tokens:
            return -(-tokens // steps)
    return chunk


def slack_tokens(latency: OnlineLatency, batch: Batch, cached: int, limit_s: float, most: int) -> int:
    """The most prompt tokens that a step of `batch` can take and still be done within `limit_s` in most
    cases, up to 3 % less, and never above `most`."""
    model, margin = latency.model, latency.margin

    def over_s(new: int) -> float:
        return margin * latency.corrected_s(model.mixed_s(batch.size, batch.context, new, cached)) - limit_s

    low, high = 0, most
    if most <= 0 or (high_s := over_s(most)) <= 0:
        return max(0, most)
    low_s = over_s(1)
    if low_s > 0:
        return 0
    low = 1
    # Regula falsi, as the function is nearly a line; a bisection now and then, as it is not quite one.
    bisects = False
    while high - low > 1 + low // 32:
        share = 0.5 if bisects else low_s / (low_s - high_s)
        middle = min(high - 1, max(low + 1, low + int((high - low) * share)))
        middle_s = over_s(middle)
        if middle_s <= 0:
            low, low_s = middle, middle_s
        else:
            high, high_s = middle, middle_s
        bisects = not bisects
    return low
