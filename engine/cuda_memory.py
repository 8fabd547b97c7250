"""How much of a GPU's memory is left for the KV cache: found by running the largest steps once.

What a step needs besides weights and KV cache depends on kernels, libraries and their workspaces; it is
measured, not computed (vLLM's profiling run, Kwon et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from engine.config import EngineConfig
from engine.cuda import CudaBackend, recorded_sizes
from engine.errors import DeviceError
from engine.executor import Executor
from engine.kv_cache import KvCache
from engine.model import LlamaModel
from engine.model_runner import ModelRunner
from engine.sequence import ScheduledChunk, TokenSampling

_RECORDING_NBYTES = 32 * 2**20
"""Allowed for one recorded step and window: FlashInfer's 8 MiB of plan, and its part of the graphs' pool."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """total, used: the whole device's, by all processes, with the weights loaded and without a KV cache.

    step: most that a step of this engine takes besides. recordings: allowed for CUDA graphs. All in bytes.
    """

    total_nbytes: int
    used_nbytes: int
    step_nbytes: int
    recordings_nbytes: int

    def for_kv_cache(self, share: float) -> int:
        """Bytes for KV blocks if this engine and all else together may take `share` of the device.

        Raises DeviceError if none are left.
        """
        rest = int(self.total_nbytes * share) - self.used_nbytes - self.step_nbytes - self.recordings_nbytes
        if rest <= 0:
            gib = 2**30
            raise DeviceError(
                f"no memory is left for a KV cache: of {self.total_nbytes / gib:.1f} GiB a share of {share} "
                f"may be used; {self.used_nbytes / gib:.1f} GiB are in use, and steps take "
                f"{(self.step_nbytes + self.recordings_nbytes) / gib:.1f} GiB; use a larger share, a smaller "
                "model or smaller max_batch_tokens"
            )
        return rest


def measure_memory(backend: CudaBackend, model: LlamaModel, max_num_seqs: int) -> DeviceMemory:
    """Run the largest steps on a KV cache of just their size, and give everything back. CUDA only.

    max_num_seqs: most sequences that a step draws a token for.
    """
    device = backend.device
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    cache_nbytes = _run_probes(replace(backend, recorder=None), model, max_num_seqs)
    step_nbytes = torch.cuda.max_memory_allocated(device) - before - cache_nbytes
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    num_plans = len(recorded_sizes(backend.config)) * len(set(backend.model_config.windows))
    return DeviceMemory(
        total_nbytes=total,
        used_nbytes=total - free,
        step_nbytes=step_nbytes,
        recordings_nbytes=num_plans * _RECORDING_NBYTES if backend.recorder else 0,
    )


def probe_steps(config: EngineConfig, max_num_seqs: int) -> list[list[ScheduledChunk]]:
    """The steps that need the most: one prompt of max_batch_tokens, and max_num_seqs sequences that draw.

    All use the same few blocks: what they compute does not matter. They draw with a top-p that looks at the
    whole vocabulary.
    """
    num_tokens = config.max_batch_tokens
    table = range(-(-num_tokens // config.block_size))
    sampling = TokenSampling(
        temperature=1.0,
        top_k=0,
        top_p=0.9999,
        seed=0,
        max_tokens=2,
        min_tokens=0,
        stop_token_ids=frozenset(),
    )
    prompt = ScheduledChunk([0] * num_tokens, 0, table, sampling, 0)
    return [[prompt], [ScheduledChunk([0], 0, table[:1], sampling, 0)] * max_num_seqs]


def _run_probes(backend: CudaBackend, model: LlamaModel, max_num_seqs: int) -> int:
    """Bytes of the KV cache that the steps ran on; it is gone when this returns."""
    steps = probe_steps(backend.config, max_num_seqs)
    cache: KvCache = backend.cache(len(steps[0][0].block_table))
    executor: Executor = backend.executor(model, cache)
    runner = ModelRunner(
        executor, backend.config.block_size, cache.num_blocks, backend.model_config.vocab_size
    )
    for chunks in steps:
        runner.step(chunks)
    torch.cuda.synchronize(backend.device)
    return cache.data.nbytes
