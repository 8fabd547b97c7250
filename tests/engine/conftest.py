"""Checkpoints to test on: the demo model, and random weights in other shapes, written by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig
from engine.engine import Engine

SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "mha_tied": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "mqa": {"num_attention_heads": 4, "num_key_value_heads": 1, "rope_theta": 500000.0},
    "wide_heads": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 24},
}


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
    return write_checkpoint(tmp_path_factory.mktemp("random"), **SHAPES["gqa"])


@pytest.fixture
def new_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a random model for a test that damages it; takes the keys of LlamaConfig."""
    return lambda **shape: write_checkpoint(tmp_path, **shape)


def write_checkpoint(path: Path, max_shard_size: str = "1GB", **shape: Any) -> Path:
    """A small random Llama. Wide initialisation, so that greedy answers do not run into a loop at once."""
    keys: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LlamaForCausalLM(LlamaConfig(**(keys | shape)))
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path


@pytest.fixture(scope="session")
def load_engine() -> Callable[..., Engine]:
    """Loads a checkpoint with a KV cache of 64 blocks; takes EngineConfig's keys."""

    def load(path: Path, **keys: Any) -> Engine:
        config: dict[str, Any] = {"num_blocks": 64, "block_size": 8}
        return Engine.load(path, EngineConfig(**(config | keys)), None, lambda fraction: None)

    return load
