"""Drawing tokens from logits, for a whole batch at once, each row by its own parameters and randomness.

The randomness of a draw is a function of (seed, position of the drawn token in its sequence) and of nothing
else: a request that is resumed on another worker, or batched with other requests, draws what it would have.
The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.sequence import TokenSampling

_MASK = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to be drawn.

    position: of that token in its whole sequence, the prompt's first token being 0.
    num_output_tokens: answer tokens drawn before it.
    """

    sampling: TokenSampling
    position: int
    num_output_tokens: int


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """One token a row of `logits`, float32 [len(draws), vocab_size].

    Stop tokens are out of the question before min_tokens; then temperature, then top-k, then top-p.
    """
    logits = _without_early_stops(logits, draws)
    tokens = logits.argmax(dim=-1)
    rows = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if rows:
        tokens[rows] = _sample_random(logits[rows], [draws[row] for row in rows])
    return [int(token) for token in tokens]


def uniforms(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) with 52 random bits, one for each (seed, position)."""
    zeros = np.zeros_like(positions)
    words = philox4x32((positions & _MASK, positions >> _WORD, zeros, zeros), (seeds & _MASK, seeds >> _WORD))
    # 52 bits, not 53: then u * total < total for every total, and a draw never falls off the end.
    return ((words[0] << np.uint64(20)) | (words[1] >> np.uint64(12))).astype(np.float64) * 2.0**-52


def philox4x32(
    counter: Sequence[npt.NDArray[np.uint64]], key: Sequence[npt.NDArray[np.uint64]]
) -> tuple[npt.NDArray[np.uint64], ...]:
    """Ten rounds over four counter and two key words; each word 32 bits wide in a uint64 array."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> _WORD) ^ c1 ^ k0, p1 & _MASK, (p0 >> _WORD) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _MASK, (k1 + np.uint64(0xBB67AE85)) & _MASK
    return c0, c1, c2, c3


def _without_early_stops(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    banned = [
        (row, token)
        for row, draw in enumerate(draws)
        if draw.num_output_tokens < draw.sampling.min_tokens
        for token in draw.sampling.stop_token_ids
        if token < logits.shape[1]
    ]
    if not banned:
        return logits
    rows, tokens = zip(*banned, strict=True)
    logits = logits.clone()
    logits[list(rows), list(tokens)] = -torch.inf
    return logits


def _sample_random(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Inverse transform sampling, in float64: the first token whose cumulated weight exceeds u."""
    samplings = [draw.sampling for draw in draws]
    temperatures = torch.tensor([s.temperature for s in samplings], dtype=torch.float64)[:, None]
    wide = logits.double()
    scaled = (wide - wide.amax(dim=-1, keepdim=True)) / temperatures
    filtered = [row for row, s in enumerate(samplings) if s.top_k > 0 or s.top_p < 1]
    if filtered:
        scaled[filtered] = _top_k_top_p(scaled[filtered], [samplings[row] for row in filtered])
    # Cumulated in order of token ids, not of probability: so two tokens that are nearly equal cannot swap
    # places, and with them the whole draw, when another batch rounds the logits differently.
    cumulated = scaled.exp().cumsum(dim=-1)
    seeds = np.array([s.seed for s in samplings], dtype=np.uint64)
    positions = np.array([draw.position for draw in draws], dtype=np.uint64)
    targets = torch.from_numpy(uniforms(seeds, positions))[:, None] * cumulated[:, -1:]
    tokens = torch.searchsorted(cumulated, targets, right=True).squeeze(1)
    # Out of reach unless no token is left to draw (all are stop tokens) or the logits are not numbers.
    return tokens.clamp(max=logits.shape[1] - 1)


def _top_k_top_p(scaled: torch.Tensor, samplings: Sequence[TokenSampling]) -> torch.Tensor:
    """-inf for all but the top_k largest (ties: the lower id), then all but the fewest that reach top_p."""
    vocab_size = scaled.shape[1]
    top_k = torch.tensor([[s.top_k if s.top_k > 0 else vocab_size] for s in samplings])
    top_p = torch.tensor([[s.top_p if s.top_p < 1 else torch.inf] for s in samplings], dtype=torch.float64)
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    kept = torch.arange(vocab_size) < top_k
    weights = ordered.exp() * kept
    cumulated = weights.cumsum(dim=-1)
    before = torch.cat((torch.zeros_like(top_p), cumulated[:, :-1]), dim=-1)
    kept = kept & (before < top_p * cumulated[:, -1:])
    kept[:, 0] = True
    return scaled.masked_fill(~torch.empty_like(kept).scatter_(1, order, kept), -torch.inf)
