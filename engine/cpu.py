"""Which kernels and which attention an engine computes with on a CPU."""

from __future__ import annotations

import logging

from engine.attention.base import AttentionBackend
from engine.attention.native import NativeAttention
from engine.attention.sdpa import SdpaAttention
from engine.config import EngineConfig, ModelConfig
from engine.errors import KernelsUnavailableError
from engine.host_memory import keep_freed_memory
from engine.kernels.base import Kernels
from engine.kernels.native import NativeKernels
from engine.kernels.torch_ops import TorchKernels
from engine.kv_cache import KvCache
from engine.native.library import load_library
from engine.shard import WHOLE, Shard

_log = logging.getLogger(__name__)


class CpuBackend:
    """The compiled kernels if `config.kernels` wants them and they can be used, else torch's; logged once.

    Raises KernelsUnavailableError if they are asked for by name and cannot be used.
    """

    def __init__(self, model: ModelConfig, config: EngineConfig, shard: Shard = WHOLE) -> None:
        layers = shard.layers(model)
        self._windows = model.windows[layers.start : layers.stop]
        self._config = config
        self._is_native = _is_native(config.kernels)
        keep_freed_memory()

    def kernels(self) -> Kernels:
        if self._is_native:
            return NativeKernels(self._config.dtype, self._config.threads)
        return TorchKernels()

    def attention(self, cache: KvCache) -> AttentionBackend:
        if self._is_native and NativeAttention.supports(cache.layout):
            return NativeAttention(cache, self._windows, self._config.threads)
        return SdpaAttention(cache, self._windows)


def _is_native(wish: str) -> bool:
    if wish == "torch":
        return False
    try:
        load_library()
    except KernelsUnavailableError as error:
        if wish == "native":
            raise KernelsUnavailableError(
                f"the compiled CPU kernels cannot be used: {error}; kernels 'auto' would fall to torch"
            ) from error
        _log.warning("event=kernels use=torch why=%r: expect a fraction of the speed", str(error))
        return False
    _log.info("event=kernels use=native")
    return True
