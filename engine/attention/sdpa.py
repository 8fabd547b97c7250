"""Attention on torch's scaled_dot_product_attention, over contexts that are gathered out of the KV blocks.

It runs on every device, and needs nothing but torch. All decoding sequences of a step are padded to one
length and computed in one call; prefill chunks, which are few and large, are computed one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from engine.batch import FlatBatch
from engine.kv_cache import KvCache
from engine.staging import to_device


@dataclass(frozen=True, slots=True)
class _Part:
    """Chunks that are computed in one call: all that decode, or one that prefills.

    rows: their tokens in the flat batch. slots: [num_chunks, longest context], KV slots by position.
    distance: [num_chunks, new tokens of each, longest context]; how many positions each stored token lies
    before each new one; negative for what a token must not see.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    distance: torch.Tensor


class SdpaAttention:
    """The AttentionBackend on torch alone."""

    def __init__(self, cache: KvCache, windows: Sequence[int | None]) -> None:
        self._cache = cache
        self._windows = windows

    def plan(self, batch: FlatBatch) -> _SdpaStep:
        new_slots = self._cache.slots(*batch.places(self._cache.layout.block_size))
        decoding = batch.query_lens == 1
        chunks = [np.flatnonzero(decoding), *np.flatnonzero(~decoding)[:, None]]
        parts = [self._part(batch, chosen) for chosen in chunks if len(chosen)]
        return _SdpaStep(self._cache, self._windows, new_slots, parts)

    def _part(self, batch: FlatBatch, chunks: np.typing.NDArray[np.int64]) -> _Part:
        """chunks: indices of chunks with equally many new tokens."""
        lengths = batch.context_lens[chunks].astype(np.int64)
        num_new = int(batch.query_lens[chunks[0]])
        rows = batch.query_starts[chunks][:, None] + np.arange(num_new)
        context = np.arange(lengths.max())
        # Padding points at the sequence's own first token: a masked NaN of somebody else would still spread.
        position = np.where(context < lengths[:, None], context, 0)
        block_size = self._cache.layout.block_size
        tables = np.take_along_axis(batch.block_tables[chunks], position // block_size, axis=1)
        slots = self._cache.slots(tables.astype(np.int64), position % block_size)
        distance = batch.positions[rows][:, :, None] - context
        flat_rows, device_distance = to_device(self._cache.data.device, rows.ravel(), distance)
        return _Part(flat_rows, slots, device_distance)


class _SdpaStep:
    def __init__(
        self,
        cache: KvCache,
        windows: Sequence[int | None],
        new_slots: torch.Tensor,
        parts: Sequence[_Part],
    ) -> None:
        self._cache = cache
        self._windows = windows
        self._new_slots = new_slots
        self._parts = parts

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> torch.Tensor:
        self._cache.write(layer, self._new_slots, keys, values)
        output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        for part in self._parts:
            output[part.rows] = self._attend_part(queries[part.rows], part, layer)
        return output

    def _attend_part(self, queries: torch.Tensor, part: _Part, layer: int) -> torch.Tensor:
        keys, values = self._cache.read(layer, part.slots)
        window = self._windows[layer]
        visible = part.distance >= 0
        if window is not None:
            visible &= part.distance < window
        num_chunks, num_new, _ = part.distance.shape
        attended = scaled_dot_product_attention(
            queries.view(num_chunks, num_new, *queries.shape[1:]).transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=visible[:, None],
            enable_gqa=True,
        )
        return attended.transpose(1, 2).reshape(queries.shape)
