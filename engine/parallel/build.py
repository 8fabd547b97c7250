"""A rank's stage, put together: device, weights of its shard, KV cache of its layers and heads, groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.attention.base import AttentionBackend
from engine.config import ModelConfig
from engine.cpu import CpuBackend
from engine.cuda import CudaBackend
from engine.device import open_device
from engine.kernels.base import Kernels
from engine.kv_cache import KvCache
from engine.layout import KvLayout
from engine.loading import weights_of
from engine.model import LlamaModel
from engine.parallel.groups import RankGroups
from engine.parallel.rank import RankPlace
from engine.parallel.stage import Stage


@dataclass(frozen=True, slots=True)
class BuiltStage:
    """A stage that can run, with the KV cache of its rank."""

    stage: Stage
    cache: KvCache


def build_stage(
    place: RankPlace,
    model_config: ModelConfig,
    meet: Callable[[torch.device], RankGroups],
    on_progress: Callable[[float], None],
) -> BuiltStage:
    """Load this rank's shard, and `meet` the other ranks."""
    config, shard = place.config, place.shard
    if config.device == "cuda":
        # One GPU a rank; whoever starts ranks on several hosts shows each rank its own.
        torch.cuda.set_device((shard.pp_rank * shard.tp_size + shard.tp_rank) % torch.cuda.device_count())
    device = open_device(config.device)
    torch.set_num_threads(config.threads)
    weights = weights_of(place.checkpoint, model_config, config, on_progress, shard)
    buffer = None if place.memory is None else place.memory.map()
    kernels: Kernels
    attention: AttentionBackend
    if device.type == "cuda":
        cuda = CudaBackend.of(model_config, config, device, shard)
        kernels, cache = cuda.kernels(), cuda.cache(config.num_blocks, buffer)
        attention = cuda.attention(cache)
    else:
        cpu = CpuBackend(model_config, config, shard)
        cache = KvCache(KvLayout.of(model_config, config, shard), config.num_blocks, buffer)
        kernels, attention = cpu.kernels(), cpu.attention(cache)
    groups = meet(device)
    groups.world.barrier()
    model = LlamaModel(model_config, shard, weights, kernels, groups.tensor)
    dtype = getattr(torch, config.dtype)
    return BuiltStage(Stage(model, attention, shard, groups.world, dtype, device), cache)
