"""How much more KV answers will take before those that end give theirs back. A core."""

from __future__ import annotations

from collections.abc import Iterable


def room_tokens(outputs: tuple[int, int, int]) -> int:
    """Of p10, p50 and p90 of an answer's tokens: for how many it is to have room, halfway between the median
    and the p90. By the median half of all outgrow their room; by the p90 batches stay too small where clients
    do not say how much they want."""
    _, middle, high = outputs
    return (middle + high) // 2


def peak_growth(answers: Iterable[tuple[int, int]]) -> int:
    """The most tokens by which what the answers hold together will have grown; 0 if it only shrinks.

    answers: of each, tokens to come, at least 1, and tokens held. All write at the same pace, and one that
    has ended gives back what it held. So the peaks are where answers end: when the one with the k-th fewest
    tokens to come, m_k, writes its last, those before it have given back their tokens h_i and all others have
    grown by m_k:

        max over k of (n - k + 1) * m_k - sum of h_i, i < k

    (Gong et al. 2025, Past-Future scheduler, predicts the peak of a batch this way.)
    """
    ending = sorted(answers)
    peak = given_back = 0
    for ended, (to_come, held) in enumerate(ending):
        peak = max(peak, (len(ending) - ended) * to_come - given_back)
        given_back += held
    return peak
