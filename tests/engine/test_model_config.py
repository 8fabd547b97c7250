"""config.json in its variants: what is read, and what is refused with which words."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

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
ARCHITECTURES: dict[str, tuple[Any, str]] = {
    "llama": (LlamaConfig, "LlamaForCausalLM"),
    "mistral": (MistralConfig, "MistralForCausalLM"),
    "qwen2": (Qwen2Config, "Qwen2ForCausalLM"),
    "qwen3": (Qwen3Config, "Qwen3ForCausalLM"),
}
FAMILIES = list(ARCHITECTURES)


def read(path: Path, family: str = "llama", **changes: object) -> ModelConfig:
    architecture = {"architectures": [ARCHITECTURES[family][1]], "model_type": family}
    (path / "config.json").write_text(json.dumps(MINIMAL | architecture | changes))
    return ModelConfig.from_pretrained(path)


def test_the_keys_of_a_llama_without_more(tmp_path: Path) -> None:
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
        "rope": {"theta": 10000.0, "scaling": None},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
        "qkv_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "windows": (None, None),
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "absent": {},
    "tokens null": {"bos_token_id": None, "eos_token_id": None},
    "tokens": {"bos_token_id": 3, "eos_token_id": [4, 5]},
    "window": {"sliding_window": 16},
    "window null": {"sliding_window": None},
    "unused window": {"sliding_window": 16, "max_window_layers": 1},
    "used window": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "window of default size": {"use_sliding_window": True, "max_window_layers": 0},
    "few layers": {"use_sliding_window": True},
    "layer types": {
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "sizes": {"head_dim": 16, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    "length": {"max_position_embeddings": 512},
    "attention bias": {"attention_bias": True},
    "all biases": {"attention_bias": True, "mlp_bias": True},
    "theta": {"rope_theta": 500000.0},
    "theta and empty scaling": {"rope_theta": 500000, "rope_scaling": None},
    "default scaling": {"rope_theta": 500000.0, "rope_scaling": {"type": "default"}},
    "parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "parameters over theta": {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 500000.0}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2}},
    "llama3": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
    "yarn without original": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "yarn in full": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 2.0,
            "original_max_position_embeddings": 512,
            "attention_factor": 1.5,
            "beta_fast": 16,
            "beta_slow": 2,
            "truncate": False,
        }
    },
}
"""Parts of a config.json, to be understood as transformers does, or refused."""

NOT_FOR = {
    "window": {"llama"},
    "unused window": {"llama", "mistral"},
    "used window": {"llama", "mistral"},
    "window of default size": {"llama", "mistral"},
    "few layers": {"llama", "mistral"},
    "layer types": {"llama", "mistral"},
    "attention bias": {"mistral", "qwen2"},
    "all biases": {"mistral", "qwen2", "qwen3"},
}
"""Families in which a variant would be passed over by transformers, and is refused by us."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_means_what_transformers_takes_it_for(tmp_path: Path, family: str, variant: str) -> None:
    if family in NOT_FOR.get(variant, set()):
        with pytest.raises(UnsupportedModelError, match=f"for {family} models"):
            read(tmp_path, family, **VARIANTS[variant])
        return
    # Most families take more KV heads for granted than this small model has.
    few_heads = {} if family == "llama" else {"num_key_value_heads": 4}
    config = read(tmp_path, family, **few_heads | VARIANTS[variant])
    theirs = ARCHITECTURES[family][0].from_pretrained(tmp_path)
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.head_dim == (getattr(theirs, "head_dim", None) or 32 // 4)
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.bos_token_id == theirs.bos_token_id
    eos = theirs.eos_token_id
    assert config.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))
    assert config.windows == windows_of_transformers(theirs, family)
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert_scaling_is(config, theirs.rope_parameters)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)  # type: ignore[no-untyped-call]
    names = {name for name, _ in model.named_parameters()}
    assert config.qkv_bias == ("model.layers.1.self_attn.q_proj.bias" in names)
    assert config.attention_out_bias == ("model.layers.1.self_attn.o_proj.bias" in names)
    assert config.mlp_bias == ("model.layers.1.mlp.down_proj.bias" in names)
    assert config.qk_norm == ("model.layers.1.self_attn.q_norm.weight" in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_null_means_as_many_kv_heads_as_heads(tmp_path: Path, family: str) -> None:
    assert read(tmp_path, family, num_key_value_heads=None).num_kv_heads == 4


@pytest.mark.parametrize(("family", "num_kv_heads"), [("mistral", 8), ("qwen2", 32), ("qwen3", 32)])
def test_kv_heads_that_are_not_said_are_those_of_transformers(
    tmp_path: Path, family: str, num_kv_heads: int
) -> None:
    sizes = {"num_attention_heads": 32, "hidden_size": 64}
    assert read(tmp_path, family, **sizes).num_kv_heads == num_kv_heads
    assert ARCHITECTURES[family][0].from_pretrained(tmp_path).num_key_value_heads == num_kv_heads


def windows_of_transformers(theirs: Any, family: str) -> tuple[int | None, ...]:
    match family:
        case "llama":
            return (None, None)
        case "mistral":
            return (theirs.sliding_window,) * 2
        case _:
            return tuple(
                theirs.sliding_window if layer_type == "sliding_attention" else None
                for layer_type in theirs.layer_types
            )


def assert_scaling_is(config: ModelConfig, theirs: dict[str, Any]) -> None:
    if config.rope.scaling is None:
        assert theirs["rope_type"] == "default"
        return
    ours = asdict(config.rope.scaling)
    assert theirs["rope_type"] == type(config.rope.scaling).__name__.removesuffix("Scaling").lower()
    given = {key: value for key, value in theirs.items() if key in ours}
    assert {key: ours[key] for key in given} == given


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_read(tmp_path: Path, family: str) -> None:
    config_class, architecture = ARCHITECTURES[family]
    config_class(num_hidden_layers=3, architectures=[architecture]).save_pretrained(tmp_path)
    config = ModelConfig.from_pretrained(tmp_path)
    assert config.num_layers == len(config.windows) == 3
    # Every key that transformers knows, those with default values included.
    everything = config_class(num_hidden_layers=3, architectures=[architecture]).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(everything, default=str))
    assert ModelConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_change_nothing_are_passed_over(tmp_path: Path, family: str) -> None:
    known = read(tmp_path, family, num_key_value_heads=4)
    harmless: dict[str, Any] = {
        "_name_or_path": "somewhere",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0",
        "use_cache": True,
        "initializer_range": 0.02,
        "attention_dropout": 0.1,
        "pretraining_tp": 2,
        "temperature": 0.6,
        "is_llama_config": True,
        "rope_interleaved": False,
        "use_mrope": False,
        "hidden_act": "silu",
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
        "heard_of_without_value": None,
    }
    assert read(tmp_path, family, num_key_value_heads=4, **harmless) == known


def test_generation_config_has_the_last_word_on_eos(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert read(tmp_path, eos_token_id=2).eos_token_ids == (7, 8)
    (tmp_path / "generation_config.json").write_text("{}")
    assert read(tmp_path, eos_token_id=2).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, r"MambaForCausalLM.*one of LlamaForCausalLM, Mistral"),
        ({"architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]}, "supported is one of"),
        ({"architectures": None}, "architectures is None"),
        ({"architectures": [["LlamaForCausalLM"]]}, r"architectures is \[\['Llama"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported for llama models is only 'silu'"),
        ({"sliding_window": 4096}, "sliding_window is 4096; supported for llama models is only None"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types is .* only None"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is .*awq.* only None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; .* only 1"),
        ({"rope_interleaved": True}, "rope_interleaved is True; .* only False"),
        ({"unheard_of": 1}, "unheard_of is 1; this key is not known for llama models.* remove it"),
        ({"unheard_of": False}, "unheard_of is False"),
        ({"auto_map": {"AutoModel": "mine.Model"}}, "auto_map is"),
        ({"logit_scale": 0.5}, "logit_scale is 0.5"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling has rope_type 'dynamic'; supported are default, linear, llama3, yarn",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters has rope_type 'longrope'"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, r"rope_parameters has rope_type \['yarn'\]"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "has partial_rotary_factor 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}, "has mscale 1.0.*'linear'"),
        ({"rope_scaling": {"type": "default", "factor": 2.0}}, "has factor 2.0.*'default'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "has full_attention"),
    ],
)
def test_other_mathematics_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(tmp_path, **changes)


def test_layers_of_another_type_are_refused_by_name(tmp_path: Path) -> None:
    layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UnsupportedModelError, match="layer_types has 'linear_attention'; supported are"):
        read(tmp_path, "qwen3", num_key_value_heads=4, layer_types=layer_types)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"]}, "it must be a list of 2, one for each layer"),
        ({"layer_types": "full_attention"}, "it must be a list of 2"),
        ({"layer_types": ["sliding_attention"] * 2}, "do not give a window"),
        (
            {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True, "sliding_window": None},
            "do not give a window",
        ),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0; it must be a positive"),
        ({"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers is -1; it must be"),
        ({"use_sliding_window": "yes"}, "use_sliding_window is 'yes'; it must be true or false"),
        ({"model_type": "qwen3"}, "model_type is 'qwen3', but architectures says 'qwen2'"),
        ({"num_key_value_heads": 32}, "must be a multiple of num_key_value_heads, 32"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: factor is missing"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            "rope_scaling: high_freq_factor is missing",
        ),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_parameters: rope_theta is -1"),
    ],
)
def test_contradictions_in_windows_and_rope_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, "qwen2", **({"num_key_value_heads": 4} | changes))


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
def test_values_that_make_no_model_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of float32, bfloat16"),
        ({"device": "gpu"}, "device is 'gpu'; it must be cpu or cuda"),
        ({"load": "random"}, "load is 'random'; it must be weights or dummy"),
    ],
)
def test_engine_config_refuses_other_names(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(num_blocks=4, **changes)
