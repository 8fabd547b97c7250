"""Drawing tokens from logits, for a whole batch at once, each row by its own parameters and randomness.

In this order: repetition, frequency and presence penalties, bias, stop tokens barred before min_tokens; then
the most likely token, or at a temperature: top-k, of these top-p, of these min-p, and a draw.

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

from engine.sequence import TokenHistory, TokenSampling
from engine.staging import to_device

CANDIDATES = 128
"""Filters look at so many of the most likely tokens first; where that is not enough, at all of them."""

_MASK = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to be drawn.

    position: of that token in its whole sequence, the prompt's first token being 0.
    num_output_tokens: answer tokens drawn before it. history: where `sampling.needs_history`.
    """

    sampling: TokenSampling
    position: int
    num_output_tokens: int
    history: TokenHistory | None = None


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """One token a row of `logits`, float32 [len(draws), vocab_size], which stay as they are."""
    if not draws:
        return []
    logits = _adjusted(logits, draws)
    tokens = torch.empty(len(draws), dtype=torch.int64, device=logits.device)
    kinds = np.array([_kind(draw.sampling) for draw in draws])
    for kind, choose in ((0, _greedy), (1, _plain), (2, _filtered)):
        rows = np.flatnonzero(kinds == kind)
        if len(rows) == len(draws):
            tokens = choose(logits, draws)
        elif len(rows):
            at = torch.from_numpy(rows).to(logits.device)
            tokens[at] = choose(logits[at], [draws[row] for row in rows.tolist()])
    return [int(token) for token in tokens.tolist()]


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


def _kind(sampling: TokenSampling) -> int:
    """0: greedy, 1: from the whole distribution, 2: from a part of it."""
    if sampling.temperature == 0:
        return 0
    return 2 if sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0 else 1


def _adjusted(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Penalties, bias and barred stop tokens applied; a copy, if there is any."""
    penalised = [row for row, draw in enumerate(draws) if draw.sampling.needs_history]
    biased = [row for row, draw in enumerate(draws) if draw.sampling.logit_bias]
    barred = [
        (row, token)
        for row, draw in enumerate(draws)
        if draw.num_output_tokens < draw.sampling.min_tokens
        for token in draw.sampling.stop_token_ids
        if token < logits.shape[1]
    ]
    if not (penalised or biased or barred):
        return logits
    logits = logits.clone()
    if penalised:
        _penalise(logits, penalised, [draws[row] for row in penalised])
    if biased:
        biases = [np.array(draws[row].sampling.logit_bias) for row in biased]
        rows = _tensor(np.repeat(biased, [len(bias) for bias in biases]), logits)
        tokens, values = np.concatenate(biases).T
        logits[rows, _tensor(tokens.astype(np.int64), logits)] += _tensor(values.astype(np.float32), logits)
    if barred:
        rows, tokens = _tensor(np.array(barred).T, logits)
        logits[rows, tokens] = -torch.inf
    return logits


def _penalise(logits: torch.Tensor, rows: Sequence[int], draws: Sequence[Draw]) -> None:
    """In place. Repetition: Keskar et al. 2019 (CTRL), section 4.1; the other two as OpenAI has them."""
    histories = [draw.history for draw in draws if draw.history is not None]
    assert len(histories) == len(draws)
    sizes = [len(history.token_ids) for history in histories]

    def spread(values: Sequence[float]) -> torch.Tensor:
        return _tensor(np.repeat(np.array(values, dtype=np.float32), sizes), logits)

    at_row = _tensor(np.repeat(rows, sizes), logits)
    at_token = _tensor(np.concatenate([history.token_ids for history in histories]), logits)
    counts = _tensor(np.concatenate([history.counts for history in histories]), logits)
    samplings = [draw.sampling for draw in draws]
    repetition = spread([s.repetition_penalty for s in samplings])
    values = logits[at_row, at_token]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= spread([s.frequency_penalty for s in samplings]) * counts
    values -= spread([s.presence_penalty for s in samplings]) * (counts > 0)
    logits[at_row, at_token] = values


def _greedy(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    return logits.argmax(dim=-1)


def _plain(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    return _inverse_transform(_probabilities(logits, draws), draws)


def _filtered(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """A draw from the tokens that top-k, top-p and min-p leave; of equals at the cut the lower ids stay."""
    probabilities = _probabilities(logits, draws)
    vocab_size = logits.shape[1]
    ordered, token_ids = logits.topk(min(CANDIDATES, vocab_size), dim=-1)
    ordered_probabilities = probabilities.gather(1, token_ids)
    cut = _Cut.of(ordered, ordered_probabilities, vocab_size, draws)
    token_ids, by_id = token_ids.sort(dim=-1)
    kept = cut.kept(ordered.gather(1, by_id), ordered_probabilities.gather(1, by_id))
    tokens = token_ids.gather(1, _inverse_transform(kept, draws)[:, None]).squeeze(1)
    # A cut at the last candidate: there may be more tokens to keep, unless the others cannot be drawn anyway.
    short = (cut.least == ordered[:, -1]) & (ordered_probabilities[:, -1] > 0)
    if ordered.shape[1] < vocab_size and bool(short.any()):
        rest = [draws[row] for row in short.nonzero().squeeze(1).tolist()]
        ordered = _descending(logits[short])
        cut = _Cut.of(ordered, _probabilities(ordered, rest), vocab_size, rest)
        tokens[short] = _inverse_transform(cut.kept(logits[short], probabilities[short]), rest)
    return tokens


@dataclass(frozen=True, slots=True)
class _Cut:
    """Where each row's filters cut, [num_rows] each.

    least: logit of the least likely token that stays. equals: how many tokens of that very logit stay.
    """

    least: torch.Tensor
    equals: torch.Tensor

    @classmethod
    def of(
        cls, ordered: torch.Tensor, probabilities: torch.Tensor, vocab_size: int, draws: Sequence[Draw]
    ) -> _Cut:
        """ordered, probabilities: of each row's most likely tokens, or of all of them, likeliest first."""
        columns = np.array([_filters(draw.sampling, vocab_size) for draw in draws])
        top_k, top_p, min_p = (_tensor(column[:, None], ordered) for column in columns.T)
        width = ordered.shape[1]
        top_k = top_k.long()
        cumulated = probabilities.cumsum(dim=-1, dtype=torch.float64)
        mass = torch.where(top_k < vocab_size, cumulated.gather(1, top_k.clamp(max=width) - 1), 1.0)
        by_top_p = 1 + (cumulated[:, :-1] < top_p * mass).sum(dim=-1, keepdim=True)
        by_min_p = (probabilities >= min_p * probabilities[:, :1]).sum(dim=-1, keepdim=True)
        kept = torch.minimum(torch.minimum(by_top_p, by_min_p), top_k).clamp(1, width)
        # Of a top-k beyond the candidates not even the mass is known here, unless no more can be drawn.
        beyond = (width < top_k) & (top_k < vocab_size) & (probabilities[:, -1:] > 0)
        kept = torch.where(beyond, width, kept)
        least = ordered.gather(1, kept - 1)
        return cls(least.squeeze(1), (kept - (ordered > least).sum(dim=-1, keepdim=True)).squeeze(1))

    def kept(self, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        """The probabilities [num_rows, n], in order of token ids, with 0 for what is cut off."""
        equal = logits == self.least[:, None]
        stays = logits > self.least[:, None]
        if bool((equal.sum(dim=-1) > self.equals).any()):
            equal &= equal.cumsum(dim=-1) <= self.equals[:, None]
        return torch.where(stays | equal, probabilities, 0.0)


def _filters(sampling: TokenSampling, vocab_size: int) -> tuple[float, float, float]:
    """top_k, top_p, min_p as numbers that cut nothing off where they are not set."""
    top_k = min(sampling.top_k, vocab_size) if sampling.top_k > 0 else vocab_size
    return top_k, sampling.top_p if sampling.top_p < 1 else np.inf, sampling.min_p


def _probabilities(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """float32 [num_rows, vocab_size] at the draws' temperatures."""
    # The clamp keeps the quotients finite; whatever is that cold is greedy.
    temperatures = np.array([draw.sampling.temperature for draw in draws]).clip(min=1e-30)
    return (logits / _tensor(temperatures.astype(np.float32)[:, None], logits)).softmax(dim=-1)


def _inverse_transform(weights: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """int64 [num_rows]: the first column at which the cumulated weight, in float64, exceeds the row's u."""
    # Cumulated in order of token ids, not of probability: so two tokens that are nearly equal cannot swap
    # places, and with them the whole draw, when another batch rounds the logits differently.
    cumulated = weights.cumsum(dim=-1, dtype=torch.float64)
    seeds = np.array([draw.sampling.seed for draw in draws], dtype=np.uint64)
    positions = np.array([draw.position for draw in draws], dtype=np.uint64)
    targets = _tensor(uniforms(seeds, positions)[:, None], weights) * cumulated[:, -1:]
    columns = torch.searchsorted(cumulated, targets, right=True).squeeze(1)
    # Out of reach unless no token is left to draw (all are stop tokens) or the logits are not numbers.
    return columns.clamp(max=weights.shape[1] - 1)


def _descending(values: torch.Tensor) -> torch.Tensor:
    """Each row sorted, the largest first."""
    if values.is_cpu:  # numpy's sort has vector instructions, torch's has not
        return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)
    return values.sort(dim=-1, descending=True).values


def _tensor(array: npt.NDArray[np.generic], like: torch.Tensor) -> torch.Tensor:
    return to_device(like.device, np.ascontiguousarray(array))[0]
