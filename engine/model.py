"""The Llama architecture over a flat batch: what one token's way through the layers is.

Llama, Mistral, Qwen2 and Qwen3 differ here only in what their config says: biases, norms of queries and keys,
attention windows, rotary scaling. A rank of a worker has its shard of the weights and meets the others where
`group` is called.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import embedding

from engine.attention.base import StepAttention
from engine.config import ModelConfig
from engine.kernels.base import Kernels
from engine.parallel.base import TensorGroup
from engine.rope import inverse_frequencies, rotary_angles, rotary_magnitude
from engine.shard import Shard
from engine.weights import LayerWeights, ModelWeights


class LlamaModel:
    """Pre-norm transformer decoder (Touvron et al. 2023), or a rank's shard of it. No state between calls."""

    def __init__(
        self, config: ModelConfig, shard: Shard, weights: ModelWeights, kernels: Kernels, group: TensorGroup
    ) -> None:
        self.config = config
        self._weights = weights
        self._kernels = kernels
        self._group = group
        self._vocabulary = shard.vocabulary(config)
        self._num_heads = len(shard.heads(config))
        self._num_kv_heads = len(shard.kv_heads(config))
        device = weights.layers[0].qkv.device
        self._frequencies = inverse_frequencies(config.rope, config.head_dim).to(device)
        self._rotary_magnitude = rotary_magnitude(config.rope)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [num_tokens, hidden_size] before the first layer; for the first stage."""
        assert self._weights.embedding is not None
        if self._group.size == 1:
            return embedding(token_ids, self._weights.embedding)
        local = token_ids - self._vocabulary.start
        foreign = (local < 0) | (local >= len(self._vocabulary))
        rows = embedding(local.masked_fill(foreign, 0), self._weights.embedding)
        return self._group.sum(rows.masked_fill(foreign[:, None], 0))

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        attention: StepAttention,
        on_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Hidden states [num_tokens, hidden_size] after this rank's layers; positions: [num_tokens].

        on_layer: told, after each layer's attention, of how many layers keys and values are stored.
        """
        kernels, eps = self._kernels, self.config.rms_norm_eps
        rotary = rotary_angles(positions, self._frequencies, self._rotary_magnitude)
        delta: torch.Tensor | None = None
        for index, layer in enumerate(self._weights.layers):
            if delta is None:
                normed = kernels.rms_norm(hidden, layer.attention_norm, eps)
            else:
                hidden, normed = kernels.add_rms_norm(hidden, delta, layer.attention_norm, eps)
            delta = self._group.sum(self._attend(normed, layer, rotary, attention, index))
            if on_layer is not None:
                on_layer(index + 1)
            hidden, normed = kernels.add_rms_norm(hidden, delta, layer.mlp_norm, eps)
            inner = kernels.gated_silu(kernels.linear(normed, layer.gate_up, layer.gate_up_bias))
            delta = self._group.sum(kernels.linear(inner, layer.down, layer.down_bias))
        return hidden if delta is None else hidden + delta

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [num_rows, vocab_size] for hidden states [num_rows, hidden_size]; for the last stage."""
        assert self._weights.final_norm is not None
        assert self._weights.lm_head is not None
        normed = self._kernels.rms_norm(hidden, self._weights.final_norm, self.config.rms_norm_eps)
        logits = self._group.concat(self._kernels.linear(normed, self._weights.lm_head, None))
        # The last ranks' shards are padded to the width of the others.
        return logits[:, : self.config.vocab_size].float()

    def _attend(
        self,
        normed: torch.Tensor,
        layer: LayerWeights,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention: StepAttention,
        index: int,
    ) -> torch.Tensor:
        kernels, eps = self._kernels, self.config.rms_norm_eps
        split = (self._num_heads, self._num_kv_heads)
        heads = kernels.linear(normed, layer.qkv, layer.qkv_bias)
        heads = heads.view(-1, self._num_heads + 2 * self._num_kv_heads, self.config.head_dim)
        turning, values = heads.split_with_sizes((sum(split), self._num_kv_heads), dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = turning.split_with_sizes(split, dim=1)
            queries = kernels.rms_norm(queries, layer.query_norm, eps)
            turning = torch.cat((queries, kernels.rms_norm(keys, layer.key_norm, eps)), dim=1)
        queries, keys = kernels.rotate(turning, *rotary).split_with_sizes(split, dim=1)
        attended = attention.attend(queries, keys, values, index)
        return kernels.linear(attended.flatten(1), layer.attention_out, layer.attention_out_bias)
