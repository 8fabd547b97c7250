"""Everything that one worker needs of a checkpoint, put together: model, KV cache and runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.attention.sdpa import SdpaAttention
from engine.config import EngineConfig, ModelConfig
from engine.executor import LocalExecutor
from engine.kernels.torch_ops import TorchKernels
from engine.kv_cache import KvCache
from engine.layout import KvLayout
from engine.model import LlamaModel
from engine.parallel.base import Solo
from engine.runner import ModelRunner
from engine.shard import WHOLE
from engine.weights import fingerprint, load_weights


@dataclass(frozen=True, slots=True)
class Engine:
    """One model on one worker.

    fingerprint: identity of the checkpoint; engines can hand sequences to each other if theirs are equal.
    """

    model_config: ModelConfig
    config: EngineConfig
    layout: KvLayout
    cache: KvCache
    runner: ModelRunner
    fingerprint: str

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        config: EngineConfig,
        buffer: memoryview | None,
        on_progress: Callable[[float], None],
    ) -> Engine:
        """Load a checkpoint directory, and set the number of threads that torch uses in this process.

        buffer: the KV cache's memory, config.num_blocks * KvLayout.of(...).block_nbytes writable bytes, or
        None for memory of its own. on_progress: told the fraction of the weights that is loaded. Raises
        CheckpointError or UnsupportedModelError.
        """
        torch.set_num_threads(config.threads)
        model_config = ModelConfig.from_pretrained(checkpoint)
        weights = load_weights(checkpoint, model_config, getattr(torch, config.dtype), on_progress)
        layout = KvLayout.of(model_config, config)
        cache = KvCache(layout, config.num_blocks, buffer)
        model = LlamaModel(model_config, WHOLE, weights, TorchKernels(), Solo())
        executor = LocalExecutor(model, SdpaAttention(cache, model_config.windows))
        runner = ModelRunner(executor, config.block_size, config.num_blocks, model_config.vocab_size)
        return cls(model_config, config, layout, cache, runner, fingerprint(checkpoint))
