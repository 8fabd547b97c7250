"""A checkpoint's weights: found, checked against the config, then read one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.config import ModelConfig, read_json_object
from engine.errors import CheckpointError, UnsupportedModelError

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16")
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; projections that read the same input are one matrix.

    attention_norm, mlp_norm: [hidden_size].
    qkv: [(num_heads + 2 * num_kv_heads) * head_dim, hidden_size], queries then keys then values.
    attention_out: [hidden_size, num_heads * head_dim].
    gate_up: [2 * intermediate_size, hidden_size], gate then up. down: [hidden_size, intermediate_size].
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
    """embedding, lm_head: [vocab_size, hidden_size], one and the same if tied. final_norm: [hidden_size]."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    lm_head: torch.Tensor


def load_weights(
    path: Path, config: ModelConfig, dtype: torch.dtype, on_progress: Callable[[float], None]
) -> ModelWeights:
    """Read `path`'s safetensors, one file or several with an index, converted to `dtype`.

    on_progress: told the fraction that is loaded, up to 1.0.
    Raises CheckpointError if a file is missing, truncated or does not hold what the config asks for,
    UnsupportedModelError for other file formats and number types.
    """
    files = _weight_files(path)
    # Compared on tensors without memory first: a config that does not fit must not cost gigabytes.
    expected = _by_name(_allocate(config, dtype, "meta"), config)
    _check(files, expected, config)
    weights = _allocate(config, dtype, "cpu")
    targets = _by_name(weights, config)
    num_loaded = 0
    num_total = sum(target.numel() for target in targets.values())
    for file in files:
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name in targets:
                    targets[name].copy_(tensors.get_tensor(name))
                    num_loaded += targets[name].numel()
                    on_progress(num_loaded / num_total)
    return weights


def fingerprint(path: Path) -> str:
    """Identity of a model: SHA-256 over config.json and, of each weight file, its size, header and both ends.

    Two checkpoints that differ only deep inside a weight file of equal layout are taken for equal: this
    catches wrong versions and wrong fine-tunes within milliseconds, not a forger.
    """
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in _weight_files(path):
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            digest.update(f"\n{file.name} {size} {header_size}\n".encode())
            digest.update(stream.read(min(header_size, size) + _MIB))
            stream.seek(max(0, size - _MIB))
            digest.update(stream.read(_MIB))
    return digest.hexdigest()


def _weight_files(path: Path) -> list[Path]:
    if (path / _SINGLE_FILE).exists():
        return [path / _SINGLE_FILE]
    index = path / _INDEX_FILE
    if not index.exists():
        others = sorted(
            file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in path.glob(pattern)
        )
        if others:
            raise UnsupportedModelError(
                f"{path} has weights as {', '.join(others)}; supported is only safetensors"
            )
        raise CheckpointError(f"{path} has no weights: {_SINGLE_FILE} or {_INDEX_FILE} is needed")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is {weight_map!r}; it must map tensors to files")
    names = set(weight_map.values())
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is not the name of a file in the same directory")
        if not (path / name).exists():
            raise CheckpointError(f"{path / name} is missing, but {_INDEX_FILE} names it")
    return [path / name for name in sorted(names)]


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        tensors = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) is truncated or not a safetensors file: {error}"
        ) from error
    with tensors:
        yield tensors


def _check(files: Sequence[Path], expected: Mapping[str, torch.Tensor], config: ModelConfig) -> None:
    """Raises unless the files together hold exactly the expected tensors, in shapes and types that fit."""
    missing = set(expected)
    for file in files:
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                stored = tensors.get_slice(name)
                if name in expected:
                    _check_tensor(file, name, stored, tuple(expected[name].shape))
                elif not _is_redundant(name, config):
                    raise CheckpointError(
                        f"{file} holds {name}, which a Llama model of {config.num_layers} layers, "
                        "as config.json says, does not have"
                    )
                missing.discard(name)
    if missing:
        few = ", ".join(sorted(missing)[:3])
        raise CheckpointError(
            f"{files[0].parent} lacks {len(missing)} of {len(expected)} tensors, such as {few}"
        )


def _check_tensor(file: Path, name: str, stored: Any, shape: tuple[int, ...]) -> None:
    if tuple(stored.get_shape()) != shape:
        raise CheckpointError(
            f"{file}: {name} has shape {tuple(stored.get_shape())}, but by config.json it should be {shape}"
        )
    if stored.get_dtype() not in _DTYPES:
        raise UnsupportedModelError(
            f"{file}: {name} is stored as {stored.get_dtype()}; supported are {', '.join(_DTYPES)}"
        )


def _is_redundant(name: str, config: ModelConfig) -> bool:
    """Tensors that some checkpoints store although they follow from the rest."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def _allocate(config: ModelConfig, dtype: torch.dtype, device: str) -> ModelWeights:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hidden, intermediate = config.hidden_size, config.intermediate_size
    num_query_rows = config.num_heads * config.head_dim
    num_qkv_rows = num_query_rows + 2 * config.num_kv_heads * config.head_dim
    embedding = empty(config.vocab_size, hidden)
    return ModelWeights(
        embedding=embedding,
        layers=tuple(
            LayerWeights(
                attention_norm=empty(hidden),
                qkv=empty(num_qkv_rows, hidden),
                attention_out=empty(hidden, num_query_rows),
                mlp_norm=empty(hidden),
                gate_up=empty(2 * intermediate, hidden),
                down=empty(hidden, intermediate),
            )
            for _ in range(config.num_layers)
        ),
        final_norm=empty(hidden),
        lm_head=embedding if config.tie_word_embeddings else empty(config.vocab_size, hidden),
    )


def _by_name(weights: ModelWeights, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Where each tensor of a Llama checkpoint goes: its name, and the (part of a) matrix that it fills."""
    targets = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.final_norm}
    if not config.tie_word_embeddings:
        targets["lm_head.weight"] = weights.lm_head
    kv_rows = config.num_kv_heads * config.head_dim
    for index, layer in enumerate(weights.layers):
        queries, keys, values = layer.qkv.split_with_sizes(
            (config.num_heads * config.head_dim, kv_rows, kv_rows)
        )
        gate, up = layer.gate_up.chunk(2)
        parts = {
            "input_layernorm": layer.attention_norm,
            "self_attn.q_proj": queries,
            "self_attn.k_proj": keys,
            "self_attn.v_proj": values,
            "self_attn.o_proj": layer.attention_out,
            "post_attention_layernorm": layer.mlp_norm,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down,
        }
        targets |= {f"model.layers.{index}.{part}.weight": tensor for part, tensor in parts.items()}
    return targets
