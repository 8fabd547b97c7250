"""What an engine on CUDA is made of: FlashInfer's kernels and recorded decode steps, or plain torch.

FlashInfer is an optional dependency, and computes bfloat16 with certain head sizes only. Without it
everything works, many times slower; a warning in the log says so and why.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import Any

import torch

from engine.attention.base import AttentionBackend
from engine.attention.flashinfer import HEAD_DIMS, FlashInferAttention
from engine.attention.sdpa import SdpaAttention
from engine.config import EngineConfig, ModelConfig
from engine.cuda_graphs import CudaRecorder, GraphExecutor, Recorder, ladder
from engine.executor import Executor, LocalExecutor
from engine.kernels.base import Kernels
from engine.kernels.cuda import FlashInferKernels
from engine.kernels.torch_ops import TorchKernels
from engine.kv_cache import KvCache
from engine.layout import KvLayout
from engine.model import LlamaModel
from engine.shard import WHOLE, Shard

MAX_RECORDED_BATCH = 256
"""Decode batches up to this size are replayed; kernels of larger ones are long enough to hide launches."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CudaBackend:
    """The choices for one rank on one device.

    flashinfer: the module, or None for torch alone. recorder: None records nothing.
    """

    model_config: ModelConfig
    config: EngineConfig
    device: torch.device
    flashinfer: Any | None
    recorder: Recorder | None
    shard: Shard = WHOLE

    @classmethod
    def of(
        cls, model_config: ModelConfig, config: EngineConfig, device: torch.device, shard: Shard = WHOLE
    ) -> CudaBackend:
        """FlashInfer and CUDA graphs where they can be used; where not, a warning says why."""
        flashinfer = import_flashinfer()
        reason = why_not_flashinfer(flashinfer, model_config, config)
        if reason is not None:
            _log.warning(
                "event=flashinfer_not_used reason=%r: attention and kernels run in plain torch, without CUDA "
                "graphs, at a fraction of the speed that this GPU allows",
                reason,
            )
            return cls(model_config, config, device, None, None, shard)
        return cls(model_config, config, device, flashinfer, CudaRecorder(), shard)

    def kernels(self) -> Kernels:
        if self.flashinfer is None:
            return TorchKernels()
        max_rows = max(self.config.max_batch_tokens, MAX_RECORDED_BATCH)
        return FlashInferKernels(self.flashinfer, max_rows, self.device)

    def cache(self, num_blocks: int, buffer: memoryview | None = None) -> KvCache:
        """A KV cache on the device, with the spare block that recorded steps need; no GPU takes a buffer."""
        layout = KvLayout.of(self.model_config, self.config, self.shard)
        return KvCache(layout, num_blocks, buffer, self.device, num_spare=1)

    def attention(self, cache: KvCache) -> AttentionBackend:
        windows = [self.model_config.windows[layer] for layer in self.shard.layers(self.model_config)]
        if self.flashinfer is None:
            return SdpaAttention(cache, windows)
        num_heads = len(self.shard.heads(self.model_config))
        return FlashInferAttention(self.flashinfer, cache, windows, num_heads, self._max_pages(cache))

    def executor(self, model: LlamaModel, cache: KvCache) -> Executor:
        """Records the decode steps, which takes some seconds; FlashInfer may compile kernels on the way."""
        attention = self.attention(cache)
        eager = LocalExecutor(model, attention, self.device)
        if self.recorder is None or not isinstance(attention, FlashInferAttention):
            return eager
        return GraphExecutor(
            eager,
            model,
            attention,
            self.recorder,
            recorded_sizes(self.config),
            spare_block=cache.num_blocks,
            max_pages=self._max_pages(cache),
            device=self.device,
        )

    def _max_pages(self, cache: KvCache) -> int:
        """Most blocks of one sequence."""
        longest = -(-self.model_config.max_position_embeddings // self.config.block_size)
        return min(longest, cache.num_blocks)


def recorded_sizes(config: EngineConfig) -> tuple[int, ...]:
    """Batch sizes of the decode steps that are recorded."""
    return ladder(min(MAX_RECORDED_BATCH, config.max_batch_tokens))


def import_flashinfer() -> Any | None:
    """The module if it is installed and can be loaded."""
    try:
        return importlib.import_module("flashinfer")
    except ImportError as error:
        _log.debug("event=flashinfer_not_imported error=%r", error)
        return None


def why_not_flashinfer(flashinfer: Any | None, model: ModelConfig, config: EngineConfig) -> str | None:
    """Why the model cannot be computed with FlashInfer; None if it can."""
    if flashinfer is None:
        return "the package flashinfer-python is missing (it comes with prelay's extra 'cuda')"
    if config.dtype != "bfloat16":
        return f"its kernels take bfloat16, and dtype is {config.dtype}"
    if model.head_dim not in HEAD_DIMS:
        return f"its kernels take heads of {', '.join(map(str, HEAD_DIMS))}, and head_dim is {model.head_dim}"
    return None
