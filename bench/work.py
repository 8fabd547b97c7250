"""The work that a step cannot avoid: bytes that must be read, products that must be computed. No torch here.

Counted are the weights of the linear layers and the KV of every sequence, read once a step, and the
arithmetic of the linear layers (the head only for rows whose logits are wanted) and of causal attention. What
an engine does besides is its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import DTYPE_NBYTES, ModelConfig


@dataclass(frozen=True, slots=True)
class Work:
    """num_bytes: read from memory. num_flops: multiplications and additions."""

    num_bytes: float
    num_flops: float

    def shortest_s(self, gemm_gflops: float, read_gbps: float) -> float:
        """The time that the work takes at least, if reading and computing overlap perfectly."""
        return max(self.num_bytes / (read_gbps * 1e9), self.num_flops / (gemm_gflops * 1e9))


def layer_parameters(model: ModelConfig) -> int:
    """Parameters of the matrices of all layers."""
    heads = model.num_heads * model.head_dim
    qkv = heads + 2 * model.num_kv_heads * model.head_dim
    return model.num_layers * model.hidden_size * (qkv + heads + 3 * model.intermediate_size)


def prefill_work(model: ModelConfig, num_tokens: int, dtype: str) -> Work:
    """One whole prompt, with logits after its last token."""
    head = model.vocab_size * model.hidden_size
    pairs = num_tokens * (num_tokens + 1) / 2
    flops = 2 * (layer_parameters(model) * num_tokens + head) + pairs * _flops_per_pair(model)
    return Work(DTYPE_NBYTES[dtype] * (layer_parameters(model) + head), flops)


def decode_work(model: ModelConfig, batch: int, context: int, dtype: str) -> Work:
    """One token for each of `batch` sequences that have `context` tokens each, the new one included."""
    weights = layer_parameters(model) + model.vocab_size * model.hidden_size
    kv = 2 * model.num_layers * model.num_kv_heads * model.head_dim * context * batch
    flops = 2 * weights * batch + batch * context * _flops_per_pair(model)
    return Work(DTYPE_NBYTES[dtype] * (weights + kv), flops)


def _flops_per_pair(model: ModelConfig) -> int:
    """Of one query token and one token that it sees: a score and a weighted value in every head."""
    return 4 * model.num_layers * model.num_heads * model.head_dim
