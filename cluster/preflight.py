"""What can be known about a checkpoint before anything is started, in a second and without torch."""

from __future__ import annotations

from cluster.config import ServeConfig
from cluster.errors import ConfigError, ModelError
from engine.config import ModelConfig
from engine.errors import EngineError
from engine.tokenizer import Tokenizer


def check_model(config: ServeConfig) -> ServeConfig:
    """Read the checkpoint's config and tokenizer; returns the configuration with max_model_len filled in.

    config: resolved. Raises ModelError if the checkpoint cannot be served, ConfigError if the configuration
    asks for more than the model or the KV caches allow.
    """
    path, limit = config.model.path, config.model.max_model_len
    assert path is not None
    try:
        model = ModelConfig.from_pretrained(path)
        tokenizer = Tokenizer.from_pretrained(path)
    except EngineError as error:
        raise ModelError(f"the model cannot be served: {error}") from error
    if tokenizer.vocab_size > model.vocab_size:
        raise ModelError(
            f"the model cannot be served: its tokenizer has {tokenizer.vocab_size} tokens, "
            f"its config.json a vocab_size of only {model.vocab_size}"
        )
    if not any(path.glob("*.safetensors")):
        raise ModelError(f"the model cannot be served: {path} holds no .safetensors file with weights")
    if limit is not None and limit > model.max_position_embeddings:
        raise ConfigError(
            f"model.max_model_len is {limit}, but {path.name} was made for sequences of at most "
            f"{model.max_position_embeddings} tokens: lower it, or leave it out"
        )
    max_model_len = limit or model.max_position_embeddings
    try:
        config.check_kv_room(max_model_len)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    section = config.model.model_copy(update={"max_model_len": max_model_len})
    return config.model_copy(update={"model": section})
