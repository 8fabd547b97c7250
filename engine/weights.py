"""The weights of one rank: which part of which tensor of the checkpoint goes where, and how it gets there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import check_files, open_tensors, weight_files
from engine.config import ModelConfig
from engine.shard import WHOLE, Shard

_MAPPED_BYTES = 16 * 2**20
"""How much of a file is read before it is closed: what was read of it stays in memory until then."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One rank's part of one layer; projections that read the same input are one matrix.

    The heads and the intermediate size are those of the rank's shard.
    attention_norm, mlp_norm: [hidden_size].
    qkv: [(num_heads + 2 * num_kv_heads) * head_dim, hidden_size], queries then keys then values.
    attention_out: [hidden_size, num_heads * head_dim].
    gate_up: [2 * intermediate_size, hidden_size], gate then up. down: [hidden_size, intermediate_size].
    Biases: one value for each output. attention_out_bias, down_bias: only on the first tensor-parallel rank,
    because the ranks' results are summed.
    query_norm, key_norm: [head_dim].
    """

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    attention_out: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    qkv_bias: torch.Tensor | None = None
    attention_out_bias: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """One rank's part of a model.

    embedding, lm_head: [ceil(vocab_size / tp_size), hidden_size], one and the same if tied; rows beyond the
    rank's vocabulary are zero. embedding is None after the first stage; final_norm [hidden_size] and lm_head
    are None before the last.
    """

    embedding: torch.Tensor | None
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor | None
    lm_head: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank keeps of one tensor of the checkpoint.

    shape: of the whole tensor, one or two dimensions. kept: the run of indices in each. target: where that
    goes.
    """

    shape: tuple[int, ...]
    kept: tuple[range, ...]
    target: torch.Tensor


def load_weights(
    path: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    on_progress: Callable[[float], None],
    shard: Shard = WHOLE,
    device: str | torch.device = "cpu",
) -> ModelWeights:
    """Read a rank's part of `path`'s safetensors, one file or several with an index, converted to `dtype`.

    No more than the part, and a few MiB of the file that is being read, is in memory at any time.
    on_progress: told the fraction that is loaded, up to 1.0.
    Raises CheckpointError if a file is missing, truncated or does not hold what the config asks for,
    UnsupportedModelError for other file formats and number types, and for models that cannot be split so.
    """
    shard.check(config)
    files = weight_files(path)
    # Compared on tensors without memory first: a config that does not fit must not cost gigabytes.
    whole = weight_parts(allocate_weights(config, dtype, WHOLE, "meta"), config, WHOLE)
    redundant = {"lm_head.weight"} if config.tie_word_embeddings else set()
    check_files(files, {name: part.shape for name, part in whole.items()}, redundant)
    weights = allocate_weights(config, dtype, shard, device)
    parts = weight_parts(weights, config, shard)
    num_loaded = 0
    num_total = sum(part.target.numel() for part in parts.values())
    for file in files:
        with open_tensors(file) as tensors:
            names = sorted(parts.keys() & set(tensors.keys()))
        for name in names:
            for rows in _pieces(parts[name]):
                with open_tensors(file) as tensors:
                    _copy_rows(tensors.get_slice(name), rows, parts[name])
            num_loaded += parts[name].target.numel()
            on_progress(num_loaded / num_total)
    return weights


def allocate_weights(
    config: ModelConfig, dtype: torch.dtype, shard: Shard, device: str | torch.device
) -> ModelWeights:
    """Weights of the right shapes for one rank, to be filled; only the padding is set, to zero."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hidden, head_dim = config.hidden_size, config.head_dim
    num_query_rows = len(shard.heads(config)) * head_dim
    num_qkv_rows = num_query_rows + 2 * len(shard.kv_heads(config)) * head_dim
    inner = len(shard.intermediate(config))
    adds_bias = shard.tp_rank == 0

    def layer() -> LayerWeights:
        return LayerWeights(
            attention_norm=empty(hidden),
            qkv=empty(num_qkv_rows, hidden),
            attention_out=empty(hidden, num_query_rows),
            mlp_norm=empty(hidden),
            gate_up=empty(2 * inner, hidden),
            down=empty(hidden, inner),
            qkv_bias=empty(num_qkv_rows) if config.qkv_bias else None,
            attention_out_bias=empty(hidden) if config.attention_out_bias and adds_bias else None,
            gate_up_bias=empty(2 * inner) if config.mlp_bias else None,
            down_bias=empty(hidden) if config.mlp_bias and adds_bias else None,
            query_norm=empty(head_dim) if config.qk_norm else None,
            key_norm=empty(head_dim) if config.qk_norm else None,
        )

    def vocabulary_rows() -> torch.Tensor:
        rows = empty(math.ceil(config.vocab_size / shard.tp_size), hidden)
        rows[len(shard.vocabulary(config)) :] = 0
        return rows

    embedding = vocabulary_rows() if shard.is_first_stage else None
    tied = embedding if config.tie_word_embeddings else None
    lm_head = (vocabulary_rows() if tied is None else tied) if shard.is_last_stage else None
    return ModelWeights(
        embedding=embedding,
        layers=tuple(layer() for _ in shard.layers(config)),
        final_norm=empty(hidden) if shard.is_last_stage else None,
        lm_head=lm_head,
    )


def weight_parts(weights: ModelWeights, config: ModelConfig, shard: Shard) -> dict[str, Part]:
    """By name of the checkpoint's tensor: which part of it goes where in a rank's weights."""
    hidden, tokens = range(config.hidden_size), shard.vocabulary(config)
    parts: dict[str, Part] = {}

    def vocabulary(name: str, matrix: torch.Tensor | None) -> None:
        if matrix is not None:
            shape = (config.vocab_size, config.hidden_size)
            parts[name] = Part(shape, (tokens, hidden), matrix[: len(tokens)])

    vocabulary("model.embed_tokens.weight", weights.embedding)
    if config.tie_word_embeddings:
        vocabulary("model.embed_tokens.weight", weights.lm_head)
    else:
        vocabulary("lm_head.weight", weights.lm_head)
    if weights.final_norm is not None:
        parts["model.norm.weight"] = Part((config.hidden_size,), (hidden,), weights.final_norm)
    for index, layer in zip(shard.layers(config), weights.layers, strict=True):
        for name, part in _layer_parts(layer, config, shard).items():
            parts[f"model.layers.{index}.{name}"] = part
    return parts


def _layer_parts(layer: LayerWeights, config: ModelConfig, shard: Shard) -> dict[str, Part]:
    hidden = range(config.hidden_size)
    queries = _rows_of_heads(shard.heads(config), config.head_dim)
    keys = _rows_of_heads(shard.kv_heads(config), config.head_dim)
    num_queries, num_keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner, num_inner = shard.intermediate(config), config.intermediate_size
    parts: dict[str, Part] = {}

    def vector(name: str, size: int, kept: range, target: torch.Tensor | None) -> None:
        if target is not None:
            parts[name] = Part((size,), (kept,), target)

    def stacked(
        names: tuple[str, ...],
        sizes: tuple[int, ...],
        kept: tuple[range, ...],
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        """Projections split by outputs, one below the other in one matrix."""
        lengths = [len(rows) for rows in kept]
        weights = weight.split_with_sizes(lengths)
        biases = [None] * len(names) if bias is None else bias.split_with_sizes(lengths)
        for name, size, rows, matrix, its_bias in zip(names, sizes, kept, weights, biases, strict=True):
            parts[f"{name}.weight"] = Part((size, config.hidden_size), (rows, hidden), matrix)
            vector(f"{name}.bias", size, rows, its_bias)

    stacked(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        (num_queries, num_keys, num_keys),
        (queries, keys, keys),
        layer.qkv,
        layer.qkv_bias,
    )
    stacked(
        ("mlp.gate_proj", "mlp.up_proj"),
        (num_inner, num_inner),
        (inner, inner),
        layer.gate_up,
        layer.gate_up_bias,
    )
    parts["self_attn.o_proj.weight"] = Part(
        (config.hidden_size, num_queries), (hidden, queries), layer.attention_out
    )
    parts["mlp.down_proj.weight"] = Part((config.hidden_size, num_inner), (hidden, inner), layer.down)
    vector("input_layernorm.weight", config.hidden_size, hidden, layer.attention_norm)
    vector("post_attention_layernorm.weight", config.hidden_size, hidden, layer.mlp_norm)
    vector("self_attn.o_proj.bias", config.hidden_size, hidden, layer.attention_out_bias)
    vector("mlp.down_proj.bias", config.hidden_size, hidden, layer.down_bias)
    vector("self_attn.q_norm.weight", config.head_dim, range(config.head_dim), layer.query_norm)
    vector("self_attn.k_norm.weight", config.head_dim, range(config.head_dim), layer.key_norm)
    return parts


def _pieces(part: Part) -> Iterator[range]:
    """The rows that are kept, cut into runs of about `_MAPPED_BYTES`."""
    step = max(1, _MAPPED_BYTES // (4 * math.prod(part.shape[1:])))
    kept = part.kept[0]
    for first in range(kept.start, kept.stop, step):
        yield range(first, min(first + step, kept.stop))


def _copy_rows(stored: Any, rows: range, part: Part) -> None:
    """stored: a safetensors slice of the whole tensor."""
    index = [slice(kept.start, kept.stop) for kept in (rows, *part.kept[1:])]
    first = part.kept[0].start
    part.target[rows.start - first : rows.stop - first].copy_(stored[tuple(index)])


def _rows_of_heads(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
