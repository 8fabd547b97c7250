"""config.json in its variants: what is read, and what is refused with which words."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig, ModelConfig
from engine.errors import CheckpointError, UnsupportedModelError

MINIMAL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 100,
}


def read(path: Path, **changes: object) -> ModelConfig:
    (path / "config.json").write_text(json.dumps(MINIMAL | changes))
    return ModelConfig.from_pretrained(path)


def test_keys_that_may_be_left_out_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    assert asdict(read(tmp_path)) == {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 8,
        "intermediate_size": 48,
        "vocab_size": 100,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_ids": (),
    }


def test_keys_that_are_given_are_read(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=[2, 3],
        rope_scaling=None,
        attention_bias=False,
        unheard_of=1,
    )
    assert (config.num_kv_heads, config.head_dim, config.max_position_embeddings) == (2, 16, 512)
    assert (config.rms_norm_eps, config.tie_word_embeddings) == (1e-5, True)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 3))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500000},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 500000.0}},
    ],
)
def test_rope_theta_is_read_where_old_and_new_transformers_write_it(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    assert read(tmp_path, **changes).rope_theta == 500000.0


def test_generation_config_has_the_last_word_on_eos(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert read(tmp_path, eos_token_id=2).eos_token_ids == (7, 8)
    (tmp_path / "generation_config.json").write_text("{}")
    assert read(tmp_path, eos_token_id=2).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, r"MambaForCausalLM.*supported is \['LlamaForCausalLM'\]"),
        ({"architectures": None}, "architectures is None"),
        ({"attention_bias": True}, "attention_bias is True; supported is only False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is only 'silu'"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.*awq"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling has rope_type 'llama3'"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type 'linear'; supported is only 'default'",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters has rope_type 'yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "has a partial_rotary_factor"),
    ],
)
def test_other_mathematics_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "32"}, "hidden_size is '32'; it must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a positive"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1; it must be a positive number"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads is 4; it must be a multiple of num_key_value_heads, 3",
        ),
        ({"num_attention_heads": 5}, "hidden_size is 32; without head_dim it must be a multiple"),
        ({"head_dim": 7}, "head_dim is 7; rotary"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be a token id or a list"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
    ],
)
def test_values_that_make_no_model_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b'{"architectures": ', "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[1]", "holds a JSON list; an object is needed"),
    ],
)
def test_a_file_without_a_json_object_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"config.json {message}"):
        ModelConfig.from_pretrained(tmp_path)


def test_a_missing_file_or_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        ModelConfig.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        ModelConfig.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("key", ["num_blocks", "block_size", "max_batch_tokens", "threads"])
def test_engine_config_refuses_what_is_not_positive(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is 0; it must be at least 1"):
        EngineConfig(**({"num_blocks": 4} | {key: 0}))  # type: ignore[arg-type]


def test_engine_config_refuses_other_number_types() -> None:
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be one of float32, bfloat16"):
        EngineConfig(num_blocks=4, dtype="int8")
