"""What of a model lies in the memory of one device, and how many tokens of KV fit beside it. Exact.

Parameters are counted as the engine shards them (engine/shard.py): every matrix of a layer over TP ranks,
runs of whole layers over PP stages, the embedding on the first stage, the head on the last, which is the
embedding once more where they are tied. The device that holds most decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import DTYPE_NBYTES, ModelConfig
from engine.errors import UnsupportedModelError
from engine.shard import Shard

RESERVED = 0.1
"""Of a device's memory that is left to activations, the runtime and fragments."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of the device that has least room: bytes of parameters, bytes of KV a token. kv_tokens: that fit beside
    the parameters; 0 if not even these do. kv_bytes: of a token on all devices of the worker together, as it
    travels."""

    weight_bytes: int
    kv_bytes_here: int
    kv_bytes: int
    kv_tokens: int


def footprint(
    model: ModelConfig, tp: int, pp: int, memory_bytes: float, dtype: str = "bfloat16"
) -> Footprint:
    """Raises UnsupportedModelError if the model cannot be split so."""
    size = DTYPE_NBYTES[dtype]
    stages = [Shard(0, tp, rank, pp) for rank in range(pp)]
    for shard in stages:
        shard.check(model)
    if pp > model.num_layers:
        raise UnsupportedModelError(f"{model.num_layers} layers cannot be {pp} stages")
    room = memory_bytes * (1 - RESERVED)
    least: Footprint | None = None
    for rank in range(pp):
        shard = stages[rank]
        layers = len(shard.layers(model))
        weights = size * _parameters(model, shard)
        kv_heads = len(shard.kv_heads(model))
        kv_here = 2 * layers * kv_heads * model.head_dim * size
        whole = 2 * model.num_layers * model.num_kv_heads * model.head_dim * size
        one = Footprint(weights, kv_here, whole, max(0, int((room - weights) // kv_here)))
        if least is None or one.kv_tokens < least.kv_tokens:
            least = one
    assert least is not None
    return least


def _parameters(model: ModelConfig, shard: Shard) -> int:
    """Of one rank, the first of its stage: no other has more."""
    heads = len(shard.heads(model)) * model.head_dim
    kv = len(shard.kv_heads(model)) * model.head_dim
    inner, hidden = len(shard.intermediate(model)), model.hidden_size
    layer = hidden * (2 * heads + 2 * kv + 3 * inner) + 2 * hidden
    layer += model.qkv_bias * (heads + 2 * kv) + model.attention_out_bias * hidden
    layer += model.mlp_bias * (2 * inner + hidden) + model.qk_norm * 2 * model.head_dim
    vocabulary = len(shard.vocabulary(model)) * hidden
    is_tied = model.tie_word_embeddings and shard.is_first_stage
    head = shard.is_last_stage * (hidden + vocabulary * (not is_tied))
    return len(shard.layers(model)) * layer + shard.is_first_stage * vocabulary + head
