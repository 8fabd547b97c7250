"""What can be known about a deployment before anything is started, in a second and without torch."""

from __future__ import annotations

from cluster.config import ServeConfig
from cluster.errors import ConfigError, ModelError
from engine.config import EngineConfig, ModelConfig
from engine.errors import EngineError, KvMemoryError
from engine.kv_sizing import blocks_of_share
from engine.layout import KvLayout
from engine.tokenizer import Tokenizer


def check_model(config: ServeConfig) -> ServeConfig:
    """Read the checkpoint's config and tokenizer; returns the configuration with max_model_len and the sizes
    of the KV caches filled in.

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
    if config.model.load == "weights" and not any(path.glob("*.safetensors")):
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
    available = available_bytes()
    config = with_kv_sizes(config, model, max_model_len, available)
    if config.ray.address is None:
        _check_memory(config, model, available)
    section = config.model.model_copy(update={"max_model_len": max_model_len})
    return config.model_copy(update={"model": section})


def with_kv_sizes(config: ServeConfig, model: ModelConfig, max_model_len: int, available: int) -> ServeConfig:
    """kv_cache_tokens filled in where it is not given. Raises ConfigError if a worker's part is too small.

    available: bytes of this machine, which in a Ray cluster stands for all of them.
    """
    size = config.kv.block_size
    block_nbytes = KvLayout.of(
        model, EngineConfig(num_blocks=1, block_size=size, dtype=config.model.dtype)
    ).block_nbytes
    missing = {
        name: section
        for name, section in (("prefill", config.prefill), ("decode", config.decode))
        if section.kv_cache_tokens is None
    }
    if not missing:
        return config
    num_workers = sum(section.replicas for section in missing.values())
    try:
        num_blocks = blocks_of_share(
            available, config.kv.memory_share, num_workers, block_nbytes, -(-max_model_len // size)
        )
    except KvMemoryError as error:
        raise ConfigError(
            f"{error} ({max_model_len} tokens): raise kv.memory_share, or lower model.max_model_len or the "
            "replicas"
        ) from error
    tokens = {"kv_cache_tokens": num_blocks * size}
    return config.model_copy(
        update={name: section.model_copy(update=tokens) for name, section in missing.items()}
    )


def available_bytes() -> int:
    """Memory that this machine can still give without swapping."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _check_memory(config: ServeConfig, model: ModelConfig, available: int) -> None:
    """The KV caches are taken when the workers start: all at once, and for good."""
    engine = EngineConfig(num_blocks=1, block_size=config.kv.block_size, dtype=config.model.dtype)
    token_bytes = KvLayout.of(model, engine).block_nbytes / config.kv.block_size
    tokens = {
        pool: section.replicas * (section.kv_cache_tokens or 0)
        for pool, section in (("prefill", config.prefill), ("decode", config.decode))
    }
    needed = token_bytes * sum(tokens.values())
    if needed > available:
        raise ConfigError(
            f"the KV caches of all workers need {needed / 2**30:,.1f} GiB (prefill {tokens['prefill']:,} and "
            f"decode {tokens['decode']:,} tokens of {token_bytes / 1024:,.1f} KiB), but this machine has "
            f"{available / 2**30:,.1f} GiB left: lower prefill.kv_cache_tokens, decode.kv_cache_tokens or "
            "the replicas"
        )
