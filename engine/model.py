"""The Llama architecture over a flat batch: what one token's way through the layers is."""

from __future__ import annotations

import torch
from torch.nn.functional import embedding, linear

from engine.attention.base import StepAttention
from engine.config import ModelConfig
from engine.layers import gated_silu, rms_norm, rotary_angles, rotate
from engine.weights import LayerWeights, ModelWeights


class LlamaModel:
    """Pre-norm transformer decoder (Touvron et al. 2023). Holds weights, and no state between calls."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config = config
        self._weights = weights

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attention: StepAttention
    ) -> torch.Tensor:
        """Hidden states [num_tokens, hidden_size] after the last norm; ids and positions: [num_tokens]."""
        config = self.config
        hidden = embedding(token_ids, self._weights.embedding)
        rotary = rotary_angles(positions, config.head_dim, config.rope_theta, hidden.dtype)
        for index, layer in enumerate(self._weights.layers):
            normed = rms_norm(hidden, layer.attention_norm, config.rms_norm_eps)
            hidden = hidden + self._attend(normed, layer, rotary, attention, index)
            normed = rms_norm(hidden, layer.mlp_norm, config.rms_norm_eps)
            hidden = hidden + linear(gated_silu(linear(normed, layer.gate_up)), layer.down)
        return rms_norm(hidden, self._weights.final_norm, config.rms_norm_eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [num_rows, vocab_size] for hidden states [num_rows, hidden_size]."""
        return linear(hidden, self._weights.lm_head).float()

    def _attend(
        self,
        normed: torch.Tensor,
        layer: LayerWeights,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention: StepAttention,
        index: int,
    ) -> torch.Tensor:
        split = (self.config.num_heads, self.config.num_kv_heads, self.config.num_kv_heads)
        heads = linear(normed, layer.qkv).view(-1, sum(split), self.config.head_dim)
        queries, keys, values = heads.split_with_sizes(split, dim=1)
        attended = attention.attend(rotate(queries, *rotary), rotate(keys, *rotary), values, index)
        return linear(attended.flatten(1), layer.attention_out)
