"""The interface that every attention backend has, and the flat batch that it is told about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.sequence import ScheduledChunk


@dataclass(frozen=True, slots=True)
class Span:
    """One chunk's tokens, which are rows of the flat batch from `first_row` on."""

    first_row: int
    chunk: ScheduledChunk

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + len(self.chunk.token_ids))


class StepAttention(Protocol):
    """Attention within one step, planned for all its layers."""

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> torch.Tensor:
        """Store the tokens' keys and values of this layer, and attend causally to all that is stored.

        queries: [num_tokens, num_heads, head_dim]; keys, values: [num_tokens, num_kv_heads, head_dim], rotary
        embedding applied. Returns [num_tokens, num_heads, head_dim].
        """
        ...


class AttentionBackend(Protocol):
    """Attention of one engine, over its KV cache."""

    def plan(self, spans: Sequence[Span]) -> StepAttention:
        """Work out, once a step, what all layers share. Raises InvalidStepError; stores nothing."""
        ...
