from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.errors import InvalidStepError
from engine.kv_cache import KvCache
from engine.layout import KvLayout, locate_context
from engine.sequence import ScheduledChunk

LAYOUT = KvLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32")


def test_a_block_is_one_run_of_bytes_in_the_given_buffer() -> None:
    buffer = bytearray(5 * LAYOUT.block_nbytes)
    cache = KvCache(LAYOUT, 5, memoryview(buffer))
    assert LAYOUT.block_nbytes == 3 * 2 * 4 * 2 * 4 * 4
    cache.data[2, 1, 0, 3, 1, 2] = 7.0
    in_block = (((1 * 2 + 0) * 4 + 3) * 2 + 1) * 4 + 2
    expected = np.zeros(5 * LAYOUT.block_nbytes // 4, dtype=np.float32)
    expected[2 * LAYOUT.block_nbytes // 4 + in_block] = 7.0
    assert bytes(buffer) == expected.tobytes()
    assert cache.blocks[2].numpy().tobytes() == bytes(
        buffer[2 * LAYOUT.block_nbytes : 3 * LAYOUT.block_nbytes]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_at_slots_is_read_there_and_nothing_else_changes(dtype: str) -> None:
    layout = KvLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=4, dtype=dtype)
    cache = KvCache(layout, 5)
    blocks, offsets = np.array([4, 0, 2]), np.array([3, 0, 1])
    slots = cache.slots(blocks, offsets)
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 3, 2, 4, generator=generator).to(cache.data.dtype)
    cache.write(1, slots, keys, values)
    assert torch.equal(cache.data[blocks, 1, 0, offsets], keys)
    assert torch.equal(cache.data[blocks, 1, 1, offsets], values)
    assert cache.data.count_nonzero() == keys.count_nonzero() + values.count_nonzero()
    read_keys, read_values = cache.read(1, slots[None].expand(2, 3))
    assert torch.equal(read_keys, keys.expand(2, 3, 2, 4))
    assert torch.equal(read_values, values.expand(2, 3, 2, 4))


def test_memory_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="5 blocks needs 3840 writable bytes, not 3839 writable"):
        KvCache(LAYOUT, 5, memoryview(bytearray(3839)))
    with pytest.raises(ValueError, match="not 3840 read-only"):
        KvCache(LAYOUT, 5, memoryview(bytes(3840)))


def test_context_is_located_through_the_block_table() -> None:
    blocks, offsets = locate_context(ScheduledChunk([1, 2, 3], 3, [7, 2, 9], None, 0), 4, 10)
    assert blocks.tolist() == [7, 7, 7, 7, 2, 2]
    assert offsets.tolist() == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (ScheduledChunk([], 0, [0], None, 0), "must have a token"),
        (ScheduledChunk([1], 8, [0, 1], None, 0), "must cover it"),
        (ScheduledChunk([1], -1, [0, 1], None, 0), "from position -1"),
        (ScheduledChunk([1], 0, [], None, 0), "with 0 blocks"),
        (ScheduledChunk([1], 0, [0, 10], None, 0), "only the blocks 0 to 9"),
        (ScheduledChunk([1], 0, [-1], None, 0), "only the blocks 0 to 9"),
    ],
)
def test_chunks_that_cannot_be_located_are_refused(chunk: ScheduledChunk, message: str) -> None:
    with pytest.raises(InvalidStepError, match=message):
        locate_context(chunk, 4, 10)
