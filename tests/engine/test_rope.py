"""Rotary frequencies and angles against those of transformers, at the sizes of the public models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.config_file import Reader
from engine.rope import inverse_frequencies, rotary_angles, rotary_magnitude
from engine.rope_config import RopeConfig, read_rope

LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: dict[str, dict[str, Any]] = {
    "none": {"rope_type": "default", "rope_theta": 10000.0},
    "large theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "llama 3.1": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "original_max_position_embeddings": 8192,
        **LLAMA31,
    },
    "llama 3.2": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "original_max_position_embeddings": 8192,
        **LLAMA31,
        "factor": 32.0,
    },
    "qwen yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "yarn in full": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 8192,
        "attention_factor": 1.25,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn of a short context": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 4,
    },
}


@pytest.mark.parametrize("head_dim", [24, 64, 128])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_angles_are_those_of_transformers(scaling: str, head_dim: int) -> None:
    keys: dict[str, Any] = {
        "head_dim": head_dim,
        "max_position_embeddings": 131072,
        "rope_parameters": SCALINGS[scaling],
    }
    theirs = LlamaRotaryEmbedding(LlamaConfig(**keys))
    rope = read_rope(Reader(keys, "config.json"), 131072)
    positions = torch.tensor([0, 1, 2, 100, 4095, 8192, 131071])
    cosines, sines = rotary_angles(positions, inverse_frequencies(rope, head_dim), rotary_magnitude(rope))
    expected = theirs(torch.empty(1), positions[None])
    # Far positions turn by 1e5 radians, of which float32 resolves 1e-2.
    torch.testing.assert_close(inverse_frequencies(rope, head_dim), theirs.inv_freq, rtol=1e-6, atol=0)
    near = positions < 5000
    for ours, both_halves in zip((cosines, sines), expected, strict=True):
        assert ours.shape == (7, head_dim // 2)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours[near], both_halves[0, near, : head_dim // 2], rtol=0, atol=1e-3)
        torch.testing.assert_close(ours, both_halves[0, :, : head_dim // 2], rtol=0, atol=2e-2)


def test_yarn_sharpens_attention_unless_it_shortens() -> None:
    def magnitude(factor: float) -> float:
        scaling = {"type": "yarn", "factor": factor, "original_max_position_embeddings": 8}
        return rotary_magnitude(read_rope(Reader({"rope_scaling": scaling}, "config.json"), 64))

    assert magnitude(4.0) == pytest.approx(1.1386294)
    assert magnitude(1.0) == magnitude(0.5) == 1.0
    assert rotary_magnitude(RopeConfig(10000.0)) == 1.0


def test_the_context_before_scaling_is_by_default_the_one_after() -> None:
    for rope_type in ("yarn", "llama3"):
        scaling = (
            {"rope_type": rope_type, **LLAMA31} if rope_type == "llama3" else {"type": "yarn", "factor": 8}
        )
        rope = read_rope(Reader({"rope_scaling": scaling}, "config.json"), 4096)
        assert rope.scaling is not None
        assert rope.scaling.original_max_position_embeddings == 4096  # type: ignore[union-attr]
