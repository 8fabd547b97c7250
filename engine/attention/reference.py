"""Attention as the formula has it, one token and one head at a time: slow, obvious, for tests.

Vaswani et al. 2017, equation 1, with grouped key-value heads (Ainslie et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.attention.base import Span
from engine.kv_cache import KvCache


class ReferenceAttention:
    """The AttentionBackend for tests: reads and writes `KvCache.data` element by element."""

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache

    def plan(self, spans: Sequence[Span]) -> _ReferenceStep:
        return _ReferenceStep(self._cache, spans)


class _ReferenceStep:
    def __init__(self, cache: KvCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        self._spans = spans

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> torch.Tensor:
        block_size = self._cache.layout.block_size
        output = torch.empty_like(queries)
        group = queries.shape[1] // keys.shape[1]
        for span in self._spans:
            table = span.chunk.block_table
            for index in range(len(span.chunk.token_ids)):
                row, position = span.first_row + index, span.chunk.start + index
                stored = self._cache.data[table[position // block_size], layer]
                stored[0, position % block_size] = keys[row]
                stored[1, position % block_size] = values[row]
                context = torch.stack(
                    [
                        self._cache.data[table[p // block_size], layer, :, p % block_size]
                        for p in range(position + 1)
                    ]
                )
                for head in range(queries.shape[1]):
                    context_keys, context_values = context[:, 0, head // group], context[:, 1, head // group]
                    scores = context_keys @ queries[row, head] / queries.shape[2] ** 0.5
                    output[row, head] = scores.softmax(0) @ context_values
        return output
