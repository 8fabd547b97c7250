"""Everything that one worker needs of a checkpoint, put together: model, KV cache and runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import EngineConfig, ModelConfig
from engine.cpu import CpuBackend
from engine.cuda import CudaBackend
from engine.device import open_device
from engine.executor import Executor, LocalExecutor
from engine.kv_cache import KvCache
from engine.layout import KvLayout
from engine.loading import fingerprint_of, weights_of
from engine.model import LlamaModel
from engine.model_runner import ModelRunner
from engine.parallel.base import Solo
from engine.shard import WHOLE


@dataclass(frozen=True, slots=True)
class Engine:
    """One model on one worker.

    executor: what `runner` computes logits with.
    fingerprint: identity of the checkpoint; engines can hand sequences to each other if theirs are equal.
    """

    model_config: ModelConfig
    config: EngineConfig
    layout: KvLayout
    cache: KvCache
    executor: Executor
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

        checkpoint: with `config.load` "dummy" it needs to hold no more than a config.json.
        buffer: the KV cache's memory, config.num_blocks * KvLayout.of(...).block_nbytes writable bytes, or
        None for memory of its own (on CUDA always None). on_progress: told the fraction of the weights that
        is loaded. Raises CheckpointError, UnsupportedModelError, DeviceError or KernelsUnavailableError.
        """
        device = open_device(config.device)
        torch.set_num_threads(config.threads)
        model_config = ModelConfig.from_pretrained(checkpoint)
        weights = weights_of(checkpoint, model_config, config, on_progress)
        layout = KvLayout.of(model_config, config)
        executor: Executor
        if device.type == "cuda":
            backend = CudaBackend.of(model_config, config, device)
            model = LlamaModel(model_config, WHOLE, weights, backend.kernels(), Solo())
            cache = backend.cache(config.num_blocks, buffer)
            executor = backend.executor(model, cache)
        else:
            cpu = CpuBackend(model_config, config)
            model = LlamaModel(model_config, WHOLE, weights, cpu.kernels(), Solo())
            cache = KvCache(layout, config.num_blocks, buffer)
            executor = LocalExecutor(model, cpu.attention(cache))
        runner = ModelRunner(executor, config.block_size, config.num_blocks, model_config.vocab_size)
        return cls(model_config, config, layout, cache, executor, runner, fingerprint_of(checkpoint, config))
