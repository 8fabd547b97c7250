"""Attention as the formula has it, one token and one head at a time: slow, obvious, for tests.

Vaswani et al. 2017, equation 1, with grouped key-value heads (Ainslie et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.batch import FlatBatch
from engine.kv_cache import KvCache


class ReferenceAttention:
    """The AttentionBackend for tests: reads and writes `KvCache.data` element by element."""

    def __init__(self, cache: KvCache, windows: Sequence[int | None]) -> None:
        self._cache = cache
        self._windows = windows

    def plan(self, batch: FlatBatch) -> _ReferenceStep:
        return _ReferenceStep(self._cache, self._windows, batch)


class _ReferenceStep:
    def __init__(self, cache: KvCache, windows: Sequence[int | None], batch: FlatBatch) -> None:
        self._cache = cache
        self._windows = windows
        self._batch = batch

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> torch.Tensor:
        output = torch.empty(queries.shape, dtype=queries.dtype)
        group = queries.shape[1] // keys.shape[1]
        for chunk, table in enumerate(self._batch.block_tables.tolist()):
            for row in range(self._batch.query_starts[chunk], self._batch.query_starts[chunk + 1]):
                position = int(self._batch.positions[row])
                self._slot(table, layer, position)[0] = keys[row]
                self._slot(table, layer, position)[1] = values[row]
                window = self._windows[layer]
                first = 0 if window is None else max(0, position - window + 1)
                context = torch.stack([self._slot(table, layer, p) for p in range(first, position + 1)])
                for head in range(queries.shape[1]):
                    context_keys, context_values = context[:, 0, head // group], context[:, 1, head // group]
                    scores = context_keys @ queries[row, head] / queries.shape[2] ** 0.5
                    output[row, head] = scores.softmax(0) @ context_values
        return output

    def _slot(self, table: Sequence[int], layer: int, position: int) -> torch.Tensor:
        """[2 (keys, values), num_kv_heads, head_dim] of one token."""
        block_size = self._cache.layout.block_size
        return self._cache.data[table[position // block_size], layer, :, position % block_size]
