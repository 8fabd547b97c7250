"""What can be known about a deployment before anything is started, in a second and without torch."""

from __future__ import annotations

from cluster.config import ServeConfig
from cluster.errors import ConfigError, ModelError
from cluster.latency_profile import read_profile
from cluster.sections import PoolSection
from engine.config import EngineConfig, ModelConfig
from engine.errors import EngineError, KvMemoryError
from engine.fake import FAKE_VOCAB_SIZE
from engine.kv_sizing import blocks_of_share
from engine.layout import KvLayout
from engine.shard import Shard
from engine.tls import Identity
from engine.tokenizer import Tokenizer
from router.errors import SettingsError
from router.tenants import read_accounts
from transfer.layout import WorkerLayout


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
    if config.model.load == "simulated" and tokenizer.vocab_size < FAKE_VOCAB_SIZE:
        raise ModelError(
            f"the model cannot be simulated: made-up answers take {FAKE_VOCAB_SIZE} tokens, the tokenizer in "
            f"{path} has {tokenizer.vocab_size}"
        )
    if config.model.load == "weights" and not any(path.glob("*.safetensors")):
        raise ModelError(f"the model cannot be served: {path} holds no .safetensors file with weights")
    if limit is not None and limit > model.max_position_embeddings:
        raise ConfigError(
            f"model.max_model_len is {limit}, but {path.name} was made for sequences of at most "
            f"{model.max_position_embeddings} tokens: lower it, or leave it out"
        )
    if config.model.profile is not None:
        read_profile(config.model.profile)
    if config.router.tenants is not None:
        try:
            read_accounts(config.router.tenants)
        except SettingsError as error:
            raise ConfigError(f"router.{error}") from error
    check_identities(config)
    for name, pool in config.pools.items():
        if config.model.load == "simulated" and pool.num_ranks > 1:
            raise ConfigError(
                f"{name}.tensor_parallel is {pool.tensor_parallel} and {name}.pipeline_parallel is "
                f"{pool.pipeline_parallel}, but model.load is simulated: a simulated worker is one process; "
                "leave both at 1, and give a profile of the split model"
            )
        try:
            Shard(0, pool.tensor_parallel, 0, pool.pipeline_parallel).check(model)
        except EngineError as error:
            raise ConfigError(
                f"the model cannot be split as {name}.tensor_parallel, {pool.tensor_parallel}, and "
                f"{name}.pipeline_parallel, {pool.pipeline_parallel}, say: {error}"
            ) from error
    max_model_len = limit or model.max_position_embeddings
    try:
        config.check_kv_room(max_model_len)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    available = available_bytes()
    config = with_kv_sizes(config, model, max_model_len, available)
    if config.ray.address is None and config.model.load != "simulated":
        _check_memory(config, model, available)
    section = config.model.model_copy(update={"max_model_len": max_model_len})
    return config.model_copy(update={"model": section})


def check_identities(config: ServeConfig) -> None:
    """Read the certificates. Raises ConfigError if they cannot be used."""
    tls = config.tls
    for key, directory, asks in (
        ("internal", tls.internal, True),
        ("clients", tls.clients, tls.client_certificates),
    ):
        if directory is not None:
            try:
                Identity(directory, asks_clients=asks)
            except EngineError as error:
                raise ConfigError(f"tls.{key}: {error}") from error


def with_kv_sizes(config: ServeConfig, model: ModelConfig, max_model_len: int, available: int) -> ServeConfig:
    """kv_cache_tokens filled in where it is not given. Raises ConfigError if a worker's part is too small.

    available: bytes of this machine, which in a Ray cluster stands for all of them. Simulated workers get the
    room that those of the model would have, although they take next to nothing of it.
    """
    size = config.kv.block_size
    missing = {
        name: pool for name, pool in config.pools.items() if pool.replicas and pool.kv_cache_tokens is None
    }
    num_workers = sum(pool.replicas for pool in missing.values())
    sized: dict[str, PoolSection] = {}
    for name, pool in missing.items():
        block_nbytes = size * token_nbytes(config, pool, model)
        try:
            num_blocks = blocks_of_share(
                available, config.kv.memory_share, num_workers, block_nbytes, -(-max_model_len // size)
            )
        except KvMemoryError as error:
            raise ConfigError(
                f"{error} ({max_model_len} tokens): raise kv.memory_share, or lower model.max_model_len or "
                "the replicas"
            ) from error
        sized[name] = pool.model_copy(update={"kv_cache_tokens": num_blocks * size})
    return config.model_copy(update=sized)


def token_nbytes(config: ServeConfig, pool: PoolSection, model: ModelConfig) -> int:
    """What one token's KV takes on a worker: more than once its bytes, where several ranks hold a head."""
    engine = EngineConfig(num_blocks=1, block_size=1, dtype=config.model.dtype)
    layout = WorkerLayout.of(KvLayout.of(model, engine), pool.tensor_parallel, pool.pipeline_parallel)
    return sum(layout.rank(rank).block_nbytes for rank in range(layout.num_ranks))


def available_bytes() -> int:
    """Memory that this machine can still give without swapping."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _check_memory(config: ServeConfig, model: ModelConfig, available: int) -> None:
    """The KV caches are taken when the workers start: all at once, and for good."""
    needed, parts = 0, []
    for name, pool in config.pools.items():
        tokens = pool.replicas * (pool.kv_cache_tokens or 0)
        nbytes = token_nbytes(config, pool, model)
        needed += tokens * nbytes
        if tokens:
            parts.append(f"{name} {tokens:,} tokens of {nbytes / 1024:,.1f} KiB")
    if needed > available:
        raise ConfigError(
            f"the KV caches of all workers need {needed / 2**30:,.1f} GiB ({' and '.join(parts)}), but this "
            f"machine has {available / 2**30:,.1f} GiB left: lower their "
            "kv_cache_tokens or the replicas"
        )
