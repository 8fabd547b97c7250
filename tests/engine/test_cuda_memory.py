"""What the profiling run of a GPU runs, and what it leaves for the KV cache; test_cuda.py does the run."""

from __future__ import annotations

import pytest

from engine.batch import FlatBatch
from engine.config import EngineConfig
from engine.cuda_memory import DeviceMemory, probe_steps
from engine.errors import DeviceError


@pytest.mark.parametrize("block_size", [1, 8, 16])
def test_the_probes_are_the_largest_steps_and_can_be_run(block_size: int) -> None:
    config = EngineConfig(num_blocks=1, block_size=block_size, max_batch_tokens=100)
    prompt, sequences = probe_steps(config, max_num_seqs=7)
    num_blocks = len(prompt[0].block_table)
    assert num_blocks == -(-100 // block_size)
    batches = [FlatBatch.of(chunks, block_size, num_blocks, vocab_size=10) for chunks in (prompt, sequences)]
    assert [(batch.num_tokens, len(batch.wanted)) for batch in batches] == [(100, 1), (7, 7)]


def test_the_cache_gets_what_weights_steps_and_recordings_leave() -> None:
    memory = DeviceMemory(total_nbytes=1000, used_nbytes=300, step_nbytes=50, recordings_nbytes=25)
    assert memory.for_kv_cache(0.9) == 900 - 300 - 50 - 25
    assert memory.for_kv_cache(1.0) == 625
    with pytest.raises(DeviceError, match=r"share of 0.375"):
        memory.for_kv_cache(0.375)
