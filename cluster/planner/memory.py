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
        layers = model.num_layers * (rank + 1) // pp - model.num_layers * rank // pp
        weights = size * _parameters(model, layers, tp, is_first=rank == 0, is_last=rank == pp - 1)
        kv_heads = max(1, model.num_kv_heads // tp)
        kv_here = 2 * layers * kv_heads * model.head_dim * size
        whole = 2 * model.num_layers * model.num_kv_heads * model.head_dim * size
        one = Footprint(weights, kv_here, whole, max(0, int((room - weights) // kv_here)))
        if least is None or one.kv_tokens < least.kv_tokens:
            least = one
    assert least is not None
    return least


def _parameters(model: ModelConfig, layers: int, tp: int, *, is_first: bool, is_last: bool) -> int:
    """Of one rank."""
    heads = model.num_heads * model.head_dim
    qkv = (
        heads + 2 * max(model.num_kv_heads, tp) * model.head_dim
    )  # KV heads are copied, if there are too few
    layer = model.hidden_size * (qkv + heads + 3 * model.intermediate_size) // tp + 2 * model.hidden_size
    vocabulary = model.vocab_size * model.hidden_size // tp
    ends = vocabulary * (is_first + (is_last and not (is_first and model.tie_word_embeddings)))
    return layers * layer + ends + (model.hidden_size if is_last else 0)
