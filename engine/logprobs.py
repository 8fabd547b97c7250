"""What the model itself thinks of tokens: log-probabilities of raw logits, before any sampling parameter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.sequence import TokenLogprobs

SLICE_ROWS = 64
"""Rows worked on at a time: beside the logits there is never more than a few copies of so many rows."""


def token_logprobs(
    logits: torch.Tensor, rows: npt.NDArray[np.int64], token_ids: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """For some rows of `logits`, float32 [any, vocab_size]: one token each, and the row's most likely ones.

    rows: [num_rows]. token_ids: [num_rows], the token that is there. num_top: [num_rows], how many of the
    most likely ones to report.
    """
    found: list[TokenLogprobs] = []
    for start in range(0, len(rows), SLICE_ROWS):
        part = slice(start, start + SLICE_ROWS)
        of_rows = logits[torch.from_numpy(rows[part]).to(logits.device)]
        found += _of_slice(of_rows, token_ids[part], num_top[part])
    return found


def _of_slice(logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    at = torch.tensor(token_ids, device=logits.device)[:, None]
    total = logits.logsumexp(dim=-1, keepdim=True)
    own = logits.gather(1, at)
    ranks = 1 + (logits > own).sum(dim=-1)
    top, top_ids = logits.topk(min(max(num_top), logits.shape[1]), dim=-1)
    columns = ((own - total).squeeze(1), ranks, top_ids, top - total)
    return [
        TokenLogprobs(token_id, logprob, rank, tuple(zip(ids[:count], values[:count], strict=True)))
        for token_id, count, logprob, rank, ids, values in zip(
            token_ids, num_top, *(column.tolist() for column in columns), strict=True
        )
    ]
