"""What a checkpoint says about its model, and how an engine is to run it. No torch here.

`ModelConfig.from_pretrained` reads a Hugging Face `config.json`. engine/families.py knows what its keys mean
in which family, and refuses by name whatever would change the mathematics and is not computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.config_file import Reader, read_json_object
from engine.errors import CheckpointError
from engine.families import Family, family_of, windows_of
from engine.rope_config import RopeConfig, read_rope

DTYPE_NBYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2}
"""The number types that an engine computes and caches in, with their size in bytes."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a Llama-family model, with the names of the field.

    qkv_bias, attention_out_bias, mlp_bias: which projections add a bias. qk_norm: queries and keys are normed
    head by head before the rotary embedding. windows: for each layer how many tokens back, itself included, a
    token sees, or None for all.
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
        reader = Reader(read_json_object(config_path), str(config_path))
        family = family_of(reader)
        num_layers = reader.positive_int("num_hidden_layers")
        num_heads = reader.positive_int("num_attention_heads")
        max_position_embeddings = reader.positive_int(
            "max_position_embeddings", family.max_position_embeddings
        )
        attention_bias = reader.boolean("attention_bias", False)
        return cls(
            num_layers=num_layers,
            hidden_size=reader.positive_int("hidden_size"),
            num_heads=num_heads,
            num_kv_heads=_num_kv_heads(reader, family, num_heads),
            head_dim=_head_dim(reader, family, num_heads),
            intermediate_size=reader.positive_int("intermediate_size"),
            vocab_size=reader.positive_int("vocab_size"),
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=reader.positive_float("rms_norm_eps", 1e-6),
            rope=read_rope(reader, max_position_embeddings),
            tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
            bos_token_id=next(iter(reader.token_ids("bos_token_id", _optional(family.bos_token_id))), None),
            eos_token_ids=_eos_token_ids(reader, family, path),
            qkv_bias=attention_bias or family.qkv_bias,
            attention_out_bias=attention_bias,
            mlp_bias=reader.boolean("mlp_bias", False),
            qk_norm=family.qk_norm,
            windows=windows_of(family, reader, num_layers),
        )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How one worker runs a model.

    num_blocks: KV blocks of this worker. block_size: tokens in a KV block.
    max_batch_tokens: most tokens of one step. threads: CPU threads of a step.
    dtype: "float32" or "bfloat16", for weights, computation and KV cache alike.
    device: "cpu" or "cuda".
    kernels: on a CPU, "native" takes the compiled ones, "torch" those of torch, "auto" the compiled ones
    where they can be used.
    load: "weights" reads the checkpoint's, "dummy" makes random ones from its config.json alone.
    """

    num_blocks: int
    block_size: int = 16
    max_batch_tokens: int = 512
    dtype: str = "float32"
    threads: int = 1
    device: str = "cpu"
    load: str = "weights"
    kernels: str = "auto"

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_batch_tokens", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.dtype not in DTYPE_NBYTES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPE_NBYTES)}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; it must be cpu or cuda")
        if self.kernels not in ("auto", "native", "torch"):
            raise ValueError(f"kernels is {self.kernels!r}; it must be auto, native or torch")
        if self.load not in ("weights", "dummy"):
            raise ValueError(f"load is {self.load!r}; it must be weights or dummy")


def _num_kv_heads(reader: Reader, family: Family, num_heads: int) -> int:
    # null is as many as query heads in every family; absent is what the family says.
    default = num_heads if "num_key_value_heads" in reader.raw else family.num_kv_heads or num_heads
    num_kv_heads = reader.positive_int("num_key_value_heads", default)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{reader.where}: num_attention_heads is {num_heads}; it must be a multiple of "
            f"num_key_value_heads, {num_kv_heads}"
        )
    return num_kv_heads


def _head_dim(reader: Reader, family: Family, num_heads: int) -> int:
    hidden_size = reader.positive_int("hidden_size")
    if reader.raw.get("head_dim", family.head_dim) is None and hidden_size % num_heads:
        raise CheckpointError(
            f"{reader.where}: hidden_size is {hidden_size}; without head_dim it must be a multiple of "
            f"num_attention_heads, {num_heads}"
        )
    default = hidden_size // num_heads if family.head_dim is None else family.head_dim
    head_dim = reader.positive_int("head_dim", default)
    if head_dim % 2:
        raise CheckpointError(
            f"{reader.where}: head_dim is {head_dim}; rotary embeddings need an even number"
        )
    return head_dim


def _eos_token_ids(reader: Reader, family: Family, path: Path) -> tuple[int, ...]:
    # As in transformers, generation_config.json has the last word: there chat models list their turn's end.
    own = reader.token_ids("eos_token_id", _optional(family.eos_token_id))
    generation_path = path / "generation_config.json"
    if not generation_path.exists():
        return own
    return Reader(read_json_object(generation_path), str(generation_path)).token_ids("eos_token_id") or own


def _optional(token_id: int | None) -> tuple[int, ...]:
    return () if token_id is None else (token_id,)
