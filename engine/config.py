"""What a checkpoint says about its model, and how an engine is to run it. No torch here.

`ModelConfig.from_pretrained` reads a Hugging Face `config.json` and refuses by name whatever would change the
mathematics and is not computed here: a wrong answer must not come from a key that was read over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, UnsupportedModelError

DTYPE_NBYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2}
"""The number types that an engine computes and caches in, with their size in bytes."""

_ARCHITECTURE = "LlamaForCausalLM"

# Keys that change the mathematics: the values under which they do not.
_NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu",),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
}


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Rotary scaling of Llama 3.1; the names are those of its config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """theta: base of the rotary frequencies. scaling: None leaves them as they are."""

    theta: float
    scaling: Llama3Scaling | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a Llama-family model, with the names of the field.

    qkv_bias, attention_out_bias, mlp_bias: which projections add a bias. qk_norm: queries and keys are normed
    head by head before the rotary embedding. windows: for each layer how many tokens back, itself included, a token sees,
    or None for all.

    eos_token_ids: the tokens with which the model ends an answer; may be empty.
    max_position_embeddings: the longest sequence (prompt and answer) that the model was made for.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]

    @classmethod
    def from_pretrained(cls, path: Path) -> ModelConfig:
        """Read `path`/config.json and, for the EOS tokens, `path`/generation_config.json where there is one.

        Raises CheckpointError for files that are missing, damaged or contradictory, UnsupportedModelError for
        models that this engine does not compute.
        """
        config_path = path / "config.json"
        raw = read_json_object(config_path)
        _refuse_unsupported(raw, config_path)
        reader = _Reader(raw, config_path)
        num_heads = reader.positive_int("num_attention_heads")
        hidden_size = reader.positive_int("hidden_size")
        if raw.get("head_dim") is None and hidden_size % num_heads:
            raise CheckpointError(
                f"{config_path}: hidden_size is {hidden_size}; without head_dim it must be a multiple of "
                f"num_attention_heads, {num_heads}"
            )
        head_dim = reader.positive_int("head_dim", default=hidden_size // num_heads)
        num_kv_heads = reader.positive_int("num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            raise CheckpointError(
                f"{config_path}: num_attention_heads is {num_heads}; it must be a multiple of "
                f"num_key_value_heads, {num_kv_heads}"
            )
        if head_dim % 2:
            raise CheckpointError(
                f"{config_path}: head_dim is {head_dim}; rotary embeddings need an even number"
            )
        tied = raw.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise CheckpointError(f"{config_path}: tie_word_embeddings is {tied!r}; it must be true or false")
        return cls(
            num_layers=reader.positive_int("num_hidden_layers"),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=reader.positive_int("intermediate_size"),
            vocab_size=reader.positive_int("vocab_size"),
            max_position_embeddings=reader.positive_int("max_position_embeddings", default=2048),
            rms_norm_eps=reader.positive_float("rms_norm_eps", default=1e-6),
            rope=RopeConfig(_rope_theta(raw, config_path)),
            tie_word_embeddings=tied,
            bos_token_id=next(iter(reader.token_ids("bos_token_id")), None),
            eos_token_ids=_eos_token_ids(reader, path),
            qkv_bias=False,
            attention_out_bias=False,
            mlp_bias=False,
            qk_norm=False,
            windows=(None,) * reader.positive_int("num_hidden_layers"),
        )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How one worker runs a model.

    num_blocks: KV blocks of this worker. block_size: tokens in a KV block.
    max_batch_tokens: most tokens of one step. threads: CPU threads of a step.
    dtype: "float32" or "bfloat16", for weights, computation and KV cache alike.
    device: "cpu" or "cuda". load: "weights" reads the checkpoint's, "dummy" makes random ones from its config.
    """

    num_blocks: int
    block_size: int = 16
    max_batch_tokens: int = 512
    dtype: str = "float32"
    threads: int = 1
    device: str = "cpu"
    load: str = "weights"

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_batch_tokens", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.dtype not in DTYPE_NBYTES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPE_NBYTES)}")


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint. Raises CheckpointError if there is none."""
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent} is not a directory; a checkpoint directory is needed")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; an object is needed")
    return value


def _refuse_unsupported(raw: Mapping[str, Any], path: Path) -> None:
    architectures = raw.get("architectures")
    if architectures != [_ARCHITECTURE]:
        raise UnsupportedModelError(
            f"{path}: architectures is {architectures!r}; supported is [{_ARCHITECTURE!r}]"
        )
    for key, neutral in _NEUTRAL_VALUES.items():
        if key in raw and raw[key] not in neutral:
            raise UnsupportedModelError(f"{path}: {key} is {raw[key]!r}; supported is only {neutral[0]!r}")
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key) or {}
        if not isinstance(rope, dict):
            raise CheckpointError(f"{path}: {key} is {rope!r}; it must be an object")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise UnsupportedModelError(
                f"{path}: {key} has rope_type {rope_type!r}; supported is only 'default'"
            )
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModelError(f"{path}: {key} has a partial_rotary_factor; supported is only 1.0")


def _rope_theta(raw: Mapping[str, Any], path: Path) -> float:
    # transformers 5 moved the key from the top level into rope_parameters.
    nested = raw.get("rope_parameters") or {}
    source = nested if "rope_theta" in nested else raw
    return _Reader(source, path).positive_float("rope_theta", default=10000.0)


def _eos_token_ids(reader: _Reader, path: Path) -> tuple[int, ...]:
    # As in transformers, generation_config.json has the last word: there chat models list their turn's end.
    generation_path = path / "generation_config.json"
    if generation_path.exists():
        generation = _Reader(read_json_object(generation_path), generation_path)
        return generation.token_ids("eos_token_id") or reader.token_ids("eos_token_id")
    return reader.token_ids("eos_token_id")


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed access to the keys of one JSON file; every complaint names file, key and value."""

    raw: Mapping[str, Any]
    path: Path

    def positive_int(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.path}: {key} is {value!r}; it must be a positive integer")
        return value

    def positive_float(self, key: str, default: float) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise CheckpointError(f"{self.path}: {key} is {value!r}; it must be a positive number")
        return float(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self.raw.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
            raise CheckpointError(
                f"{self.path}: {key} is {value!r}; it must be a token id or a list of token ids"
            )
        return tuple(ids)

    def _get(self, key: str, default: float | None) -> Any:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.path}: {key} is missing")
        return value
