"""Attention on torch's scaled_dot_product_attention, over contexts that are gathered out of the KV blocks.

All decoding sequences of a step are padded to one length and computed in one call; prefill chunks, which are
few and large, are computed one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from engine.attention.base import Span
from engine.kv_cache import KvCache
from engine.layout import locate_context


@dataclass(frozen=True, slots=True)
class _Decode:
    """The single-token chunks. rows: [batch]. slots: [batch, longest]. mask: [batch, 1, 1, longest]."""

    rows: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Prefill:
    """One chunk of several tokens. slots: [context]. mask: [tokens, context]."""

    rows: slice
    slots: torch.Tensor
    mask: torch.Tensor


class CpuAttention:
    """The AttentionBackend for CPUs."""

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache

    def plan(self, spans: Sequence[Span]) -> _CpuStep:
        contexts = [self._context_slots(span) for span in spans]
        new_slots = [context[span.chunk.start :] for span, context in zip(spans, contexts, strict=True)]
        decodes: list[tuple[int, torch.Tensor]] = []
        prefills: list[_Prefill] = []
        for span, context in zip(spans, contexts, strict=True):
            if len(span.chunk.token_ids) == 1:
                decodes.append((span.first_row, context))
            else:
                query_positions = torch.arange(span.chunk.start, len(context))
                mask = torch.arange(len(context)) <= query_positions[:, None]
                prefills.append(_Prefill(span.rows, context, mask))
        return _CpuStep(self._cache, torch.cat(new_slots), _batch_decodes(decodes), prefills)

    def _context_slots(self, span: Span) -> torch.Tensor:
        block_size, num_blocks = self._cache.layout.block_size, self._cache.num_blocks
        return self._cache.slots(*locate_context(span.chunk, block_size, num_blocks))


class _CpuStep:
    def __init__(
        self, cache: KvCache, new_slots: torch.Tensor, decode: _Decode | None, prefills: Sequence[_Prefill]
    ) -> None:
        self._cache = cache
        self._new_slots = new_slots
        self._decode = decode
        self._prefills = prefills

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> torch.Tensor:
        self._cache.write(layer, self._new_slots, keys, values)
        output = torch.empty_like(queries)
        if self._decode is not None:
            output[self._decode.rows] = self._attend_decode(queries[self._decode.rows], self._decode, layer)
        for prefill in self._prefills:
            output[prefill.rows] = self._attend_prefill(queries[prefill.rows], prefill, layer)
        return output

    def _attend_decode(self, queries: torch.Tensor, decode: _Decode, layer: int) -> torch.Tensor:
        keys, values = self._cache.read(layer, decode.slots)
        batch, _, num_kv_heads, head_dim = keys.shape
        # The query heads that share a KV head stand where several query tokens would: nothing is repeated.
        grouped = queries.view(batch, num_kv_heads, -1, head_dim)
        attended = scaled_dot_product_attention(
            grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=decode.mask
        )
        return attended.reshape(queries.shape)

    def _attend_prefill(self, queries: torch.Tensor, prefill: _Prefill, layer: int) -> torch.Tensor:
        keys, values = self._cache.read(layer, prefill.slots)
        attended = scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            attn_mask=prefill.mask,
            enable_gqa=True,
        )
        return attended.squeeze(0).transpose(0, 1)


def _batch_decodes(decodes: Sequence[tuple[int, torch.Tensor]]) -> _Decode | None:
    if not decodes:
        return None
    rows = torch.tensor([row for row, _ in decodes])
    lengths = torch.tensor([len(context) for _, context in decodes])
    slots = torch.nn.utils.rnn.pad_sequence([context for _, context in decodes], batch_first=True)
    valid = torch.arange(slots.shape[1]) < lengths[:, None]
    # Padding points at the sequence's own first token: a masked NaN of somebody else would still spread.
    slots = torch.where(valid, slots, slots[:, :1])
    return _Decode(rows, slots, valid[:, None, None, :])
