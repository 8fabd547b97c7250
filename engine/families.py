"""The model families: what sets them apart, and which keys of their config.json mean what. No torch here.

Defaults are those of the config classes of transformers: a key that is absent must mean what it means there.
A key that is not known is refused, because it might change the mathematics: a wrong answer must not come from
a key that was read over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from engine.config_file import Reader
from engine.errors import CheckpointError, UnsupportedModelError


class Windows(Enum):
    """How a family's config.json says which layers attend to a sliding window."""

    NONE = "none"
    ALL_LAYERS = "all layers, if sliding_window is set"
    BY_LAYER = "layer_types, or the layers from max_window_layers on, if use_sliding_window"


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture of transformers.

    keys: keys of its config.json that change its mathematics, beyond those that all families have.
    qkv_bias: whether there is one whatever `attention_bias` says. qk_norm: see ModelConfig.
    num_kv_heads, head_dim, max_position_embeddings, bos_token_id, eos_token_id: where the key is absent; None
    is as many as query heads, hidden_size / query heads, and no token.
    """

    model_type: str
    keys: frozenset[str]
    windows: Windows
    max_position_embeddings: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None


_BY_LAYER_KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        model_type="llama",
        keys=frozenset({"attention_bias", "mlp_bias"}),
        windows=Windows.NONE,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "MistralForCausalLM": Family(
        model_type="mistral",
        keys=frozenset({"sliding_window"}),
        windows=Windows.ALL_LAYERS,
        max_position_embeddings=131072,
        num_kv_heads=8,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "Qwen2ForCausalLM": Family(
        model_type="qwen2",
        keys=_BY_LAYER_KEYS,
        windows=Windows.BY_LAYER,
        max_position_embeddings=32768,
        num_kv_heads=32,
        qkv_bias=True,
    ),
    "Qwen3ForCausalLM": Family(
        model_type="qwen3",
        keys=_BY_LAYER_KEYS | {"attention_bias"},
        windows=Windows.BY_LAYER,
        max_position_embeddings=32768,
        num_kv_heads=32,
        head_dim=128,
        qk_norm=True,
    ),
}
"""By the name in `architectures`."""

_COMMON_KEYS = frozenset(
    key
    for line in (
        "architectures model_type num_hidden_layers hidden_size num_attention_heads num_key_value_heads",
        "head_dim intermediate_size vocab_size max_position_embeddings rms_norm_eps tie_word_embeddings",
        "bos_token_id eos_token_id rope_theta rope_scaling rope_parameters",
    )
    for key in line.split()
)
"""Keys that are read in every family."""

_HARMLESS_KEYS = frozenset(
    key
    for line in (
        # Where the checkpoint comes from, and how transformers runs it.
        "_name_or_path name_or_path _commit_hash transformers_version torch_dtype dtype use_cache",
        "attn_implementation _attn_implementation _attn_implementation_autoset experts_implementation",
        "torchscript gradient_checkpointing return_dict output_hidden_states output_attentions",
        "tie_last_hidden_states",
        "tokenizer_class transformers.js_config is_llama_config unsloth_version unsloth_fixed",
        # Training: initialisation, and dropout, which inference does not have.
        "initializer_range attention_dropout hidden_dropout embd_pdrop resid_pdrop attn_pdrop tf_legacy_loss",
        # The order of sums, nothing else.
        "pretraining_tp chunk_size_feed_forward",
        # Other tasks than generation.
        "id2label label2id num_labels problem_type finetuning_task task_specific_params is_decoder",
        "tie_encoder_decoder cross_attention_hidden_size use_bfloat16",
        # Other tokens.
        "pad_token_id sep_token_id unk_token_id decoder_start_token_id prefix forced_bos_token_id",
        "forced_eos_token_id bad_words_ids suppress_tokens begin_suppress_tokens",
        # How to generate, which is what requests say.
        "max_sequence_length max_length min_length max_new_tokens min_new_tokens do_sample temperature top_k",
        "top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty",
        "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size early_stopping num_beams",
        "num_beam_groups diversity_penalty num_return_sequences output_scores return_dict_in_generate",
        "remove_invalid_values exponential_decay_length_penalty target_lookbehind num_assistant_tokens",
        "num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind",
    )
    for key in line.split()
)
"""Keys that say nothing about what is computed."""

_NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "layer_types": (),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "quantization_config": (),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
}
"""Keys that would change the mathematics of families that do not have them: the values, besides null, that do
not."""


def family_of(model: Reader) -> Family:
    """The family of a config.json all of whose keys are understood.

    Raises UnsupportedModelError for other architectures, for unknown keys and for values of known ones that
    are not computed here; CheckpointError if `architectures` and `model_type` name different families.
    """
    architectures = model.raw.get("architectures")
    family = next((family for name, family in FAMILIES.items() if architectures == [name]), None)
    if family is None:
        raise UnsupportedModelError(
            f"{model.where}: architectures is {architectures!r}; supported is one of {', '.join(FAMILIES)}"
        )
    model_type = model.raw.get("model_type")
    if model_type not in (family.model_type, None):
        raise CheckpointError(
            f"{model.where}: model_type is {model_type!r}, but architectures says {family.model_type!r}"
        )
    for key, value in model.raw.items():
        if value is None or key in _COMMON_KEYS | _HARMLESS_KEYS | family.keys:
            continue
        if key not in _NEUTRAL_VALUES:
            raise UnsupportedModelError(
                f"{model.where}: {key} is {value!r}; this key is not known for {family.model_type} models "
                "and might change what they compute; remove it from the file if it does not"
            )
        if value not in _NEUTRAL_VALUES[key]:
            supported = (*_NEUTRAL_VALUES[key], None)[0]
            raise UnsupportedModelError(
                f"{model.where}: {key} is {value!r}; supported for {family.model_type} models is only "
                f"{supported!r}"
            )
    return family


def windows_of(family: Family, model: Reader, num_layers: int) -> tuple[int | None, ...]:
    """For each layer how many tokens back, itself included, a token sees, or None for all."""
    match family.windows:
        case Windows.NONE:
            return (None,) * num_layers
        case Windows.ALL_LAYERS:
            return (_window(model),) * num_layers
        case Windows.BY_LAYER:
            window = _window(model) if model.boolean("use_sliding_window", False) else None
            return tuple(
                _window_of_layer(model, layer_type, window)
                for layer_type in _layer_types(model, num_layers, window is not None)
            )


def _window(model: Reader) -> int | None:
    """An absent sliding_window is one of 4096 tokens; null is none."""
    if "sliding_window" in model.raw and model.raw["sliding_window"] is None:
        return None
    return model.positive_int("sliding_window", 4096)


def _layer_types(model: Reader, num_layers: int, has_window: bool) -> list[Any]:
    layer_types = model.raw.get("layer_types")
    if layer_types is None:
        # null is not a number of layers; transformers refuses it too.
        first = model.raw.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise CheckpointError(
                f"{model.where}: max_window_layers is {first!r}; it must be a number of layers"
            )
        sliding = range(first, num_layers) if has_window else range(0)
        return ["sliding_attention" if layer in sliding else "full_attention" for layer in range(num_layers)]
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise CheckpointError(
            f"{model.where}: layer_types is {layer_types!r}; it must be a list of {num_layers}, "
            "one for each layer"
        )
    return layer_types


def _window_of_layer(model: Reader, layer_type: object, window: int | None) -> int | None:
    match layer_type:
        case "full_attention":
            return None
        case "sliding_attention" if window is not None:
            return window
        case "sliding_attention":
            raise CheckpointError(
                f"{model.where}: layer_types has sliding_attention, but use_sliding_window and "
                "sliding_window do not give a window"
            )
        case _:
            raise UnsupportedModelError(
                f"{model.where}: layer_types has {layer_type!r}; supported are full_attention and "
                "sliding_attention"
            )
