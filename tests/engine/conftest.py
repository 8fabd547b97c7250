"""Checkpoints to test on: the demo model, and random weights of every family, written by transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.batch import FlatBatch
from engine.config import EngineConfig
from engine.engine import Engine
from engine.sequence import ScheduledChunk

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}
MHA = {"num_attention_heads": 4, "num_key_value_heads": 4}
MQA = {"num_attention_heads": 4, "num_key_value_heads": 1}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama_gqa": {"family": "llama", **GQA},
    "llama_mha_tied": {"family": "llama", **MHA, "tie_word_embeddings": True},
    "llama_mqa": {"family": "llama", **MQA, "rope_parameters": {"rope_theta": 500000.0}},
    "llama_wide_heads": {
        "family": "llama",
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 24,
    },
    "llama_biases": {"family": "llama", **GQA, "attention_bias": True, "mlp_bias": True},
    "llama31_tied": {"family": "llama", **GQA, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "llama_linear_rope": {
        "family": "llama",
        **MHA,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "mistral_window": {"family": "mistral", **GQA, "sliding_window": 24},
    "mistral_tied": {"family": "mistral", **MQA, "sliding_window": None, "tie_word_embeddings": True},
    "qwen2_tied": {"family": "qwen2", **GQA, "tie_word_embeddings": True},
    "qwen2_windows": {
        "family": "qwen2",
        **MQA,
        "use_sliding_window": True,
        "sliding_window": 10,
        "max_window_layers": 1,
    },
    "qwen2_yarn": {"family": "qwen2", **MHA, "rope_parameters": YARN_ROPE},
    "qwen3_tied": {"family": "qwen3", **GQA, "head_dim": 24, "tie_word_embeddings": True},
    "qwen3_biases_windows": {
        "family": "qwen3",
        **MHA,
        "head_dim": 16,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 17,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3_yarn": {"family": "qwen3", **MQA, "head_dim": 32, "rope_parameters": YARN_ROPE},
}
"""Every family, each with tied and untied embeddings and some of what it alone has."""


@pytest.fixture(scope="session")
def storyteller() -> Path:
    """The demo model's directory."""
    return Path(__file__).parents[2] / "deploy" / "models" / "storyteller"


@pytest.fixture(scope="session", params=["storyteller", *SHAPES])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, then a random one of each shape."""
    if request.param == "storyteller":
        return Path(request.getfixturevalue("storyteller"))
    return write_checkpoint(tmp_path_factory.mktemp(request.param), **SHAPES[request.param])


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One random model; not to be written to."""
    return write_checkpoint(tmp_path_factory.mktemp("random"), **SHAPES["llama_gqa"])


@pytest.fixture
def new_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a random model for a test that damages it; takes the arguments of write_checkpoint."""
    return lambda **shape: write_checkpoint(tmp_path, **shape)


def write_checkpoint(path: Path, family: str = "llama", max_shard_size: str = "1GB", **shape: Any) -> Path:
    """A small random model, in float32; `shape`: keys of its config.

    Wide initialisation, so that greedy answers do not run into a loop soon; biases and norms are drawn, too.
    """
    keys: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": None,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    config_class, model_class = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = model_class(config_class(**(keys | shape)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.normal_(0, 0.3)
                elif name.endswith("norm.weight"):
                    parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path


@pytest.fixture(scope="session")
def load_reference() -> Callable[..., Any]:
    """Loads a checkpoint into transformers, in float32 or the `dtype` given."""

    def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)

    return load


@pytest.fixture(scope="session")
def load_engine() -> Callable[..., Engine]:
    """Loads a checkpoint with a KV cache of 64 blocks; takes EngineConfig's keys."""

    def load(path: Path, **keys: Any) -> Engine:
        config: dict[str, Any] = {"num_blocks": 64, "block_size": 8}
        return Engine.load(path, EngineConfig(**(config | keys)), None, lambda fraction: None)

    return load


@pytest.fixture(scope="session")
def logits_of() -> Callable[[Engine, Sequence[ScheduledChunk]], torch.Tensor]:
    """Runs one step, and gives the logits after each of its tokens: float32 [num_tokens, vocab_size]."""

    def logits_of(engine: Engine, chunks: Sequence[ScheduledChunk]) -> torch.Tensor:
        config = engine.config
        batch = FlatBatch.of(chunks, config.block_size, config.num_blocks, engine.model_config.vocab_size)
        return engine.executor.logits(replace(batch, wanted=np.arange(batch.num_tokens)))

    return logits_of
