"""The interface that every attention backend has."""

from __future__ import annotations

from typing import Protocol

import torch

from engine.batch import FlatBatch


class StepAttention(Protocol):
    """Attention within one step, planned for all its layers."""

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> torch.Tensor:
        """Store the tokens' keys and values of this layer, and attend causally to all that is stored.

        queries: [num_tokens, num_heads, head_dim]; keys, values: [num_tokens, num_kv_heads, head_dim], rotary
        embedding applied; the last dimension is contiguous. layer: counted from the cache's first.
        Returns [num_tokens, num_heads, head_dim], contiguous.
        """
        ...


class AttentionBackend(Protocol):
    """Attention of one engine, over its KV cache.

    A backend is made for (cache, windows): for each layer of the cache how many tokens back, itself included,
    a token sees, or None for all (sliding-window attention, Beltagy et al. 2020).
    """

    def plan(self, batch: FlatBatch) -> StepAttention:
        """Work out, once a step, what all layers share; stores nothing."""
        ...
