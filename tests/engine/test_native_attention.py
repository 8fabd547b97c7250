"""The compiled attention against the reference, on random mixtures of chunks over random caches."""

from __future__ import annotations

import random

import pytest
import torch

from engine.attention.native import NativeAttention
from engine.attention.reference import ReferenceAttention
from engine.batch import FlatBatch
from engine.errors import KernelsUnavailableError
from engine.kv_cache import KvCache
from engine.layout import KvLayout
from engine.native.library import load_library
from engine.sequence import ScheduledChunk

TOLERANCES = {"float32": {"atol": 1e-5, "rtol": 1e-4}, "bfloat16": {"atol": 3e-2, "rtol": 3e-2}}


@pytest.fixture(autouse=True)
def _needs_library() -> None:
    try:
        load_library()
    except KernelsUnavailableError as error:
        pytest.skip(str(error))


def layout_of(dtype: str, num_kv_heads: int, head_dim: int, block_size: int) -> KvLayout:
    return KvLayout(2, num_kv_heads, head_dim, block_size, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (5, 1), (9, 3)])
@pytest.mark.parametrize("seed", range(6))
def test_native_is_the_reference(dtype: str, num_heads: int, num_kv_heads: int, seed: int) -> None:
    dice = random.Random(seed)
    head_dim, block_size = dice.choice([32, 64, 128]), dice.choice([3, 8, 16])
    layout = layout_of(dtype, num_kv_heads, head_dim, block_size)
    lengths = [dice.choice([1, 1, 2, 7, 8, 25]) for _ in range(5)]
    starts = [dice.choice([0, 0, 5, 60]) for _ in lengths]
    needed = [-(-(start + length) // block_size) for start, length in zip(starts, lengths, strict=True)]
    # Blocks that no sequence has are not numbers: nothing of them may be seen.
    blocks = dice.sample(range(sum(needed) + 5), sum(needed))
    tables = [blocks[sum(needed[:at]) : sum(needed[: at + 1])] for at in range(len(needed))]
    chunks = [
        ScheduledChunk([0] * length, start, table, None, 0)
        for length, start, table in zip(lengths, starts, tables, strict=True)
    ]
    batch = FlatBatch.of(chunks, block_size, len(blocks) + 5, vocab_size=1)
    windows = (None, dice.choice([1, 6, 40]))
    caches = KvCache(layout, len(blocks) + 5), KvCache(layout, len(blocks) + 5)
    generator = torch.Generator().manual_seed(seed)
    caches[0].data.fill_(torch.nan)
    for table, start in zip(tables, starts, strict=True):
        for position in range(start):
            slot = caches[0].data[table[position // block_size], :, :, position % block_size]
            slot.copy_(torch.randn(slot.shape, generator=generator))
    caches[1].data.copy_(caches[0].data)
    steps = (
        NativeAttention(caches[0], windows, threads=1 + seed % 3).plan(batch),
        ReferenceAttention(caches[1], windows).plan(batch),
    )
    for layer in (1, 0):
        # Queries, keys and values cut out of one matrix, as the model gives them.
        heads = torch.randn(sum(lengths), num_heads + 2 * num_kv_heads, head_dim, generator=generator)
        split = (num_heads, num_kv_heads, num_kv_heads)
        queries, keys, values = heads.to(caches[0].data.dtype).split_with_sizes(split, dim=1)
        attended, expected = (step.attend(queries, keys, values, layer) for step in steps)
        torch.testing.assert_close(attended, expected, **TOLERANCES[dtype])
        assert torch.equal(caches[0].data.isnan(), caches[1].data.isnan())
        assert torch.equal(caches[0].data.nan_to_num(), caches[1].data.nan_to_num())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_new", [1, 600])
def test_contexts_longer_than_any_tile(dtype: str, num_new: int) -> None:
    layout = layout_of(dtype, num_kv_heads=1, head_dim=64, block_size=16)
    length = 1300
    cache = KvCache(layout, 82)
    generator = torch.Generator().manual_seed(0)
    cache.data.copy_(torch.randn(cache.data.shape, generator=generator))
    table = random.Random(0).sample(range(82), 82)
    chunk = ScheduledChunk([0] * num_new, length - num_new, table, None, 0)
    batch = FlatBatch.of([chunk], 16, 82, vocab_size=1)
    # A score far above the others, in another tile than most of them.
    queries = torch.randn(num_new, 2, 64, generator=generator).to(cache.data.dtype)
    keys, values = torch.randn(2, num_new, 1, 64, generator=generator).to(cache.data.dtype)
    cache.data[table[3], 0, 0, 5, 0] = queries[-1, 0] * 2
    attended = NativeAttention(cache, (None, None), threads=1).plan(batch).attend(queries, keys, values, 0)
    stored = cache.data[table, 0].float().permute(1, 0, 2, 3, 4).flatten(1, 2)[:, :length, 0]
    for row in (0, num_new // 2, num_new - 1):
        seen = length - num_new + row + 1
        scores = stored[0, :seen] @ queries[row].float().T / 8
        expected = scores.softmax(0).T @ stored[1, :seen]
        torch.testing.assert_close(attended[row].float(), expected, **TOLERANCES[dtype])


def test_a_sequence_gets_the_same_bits_beside_any_others() -> None:
    layout = layout_of("bfloat16", num_kv_heads=3, head_dim=64, block_size=16)
    cache = KvCache(layout, 40)
    generator = torch.Generator().manual_seed(0)
    cache.data.copy_(torch.randn(cache.data.shape, generator=generator))
    chunks = [ScheduledChunk([0], 30 + 20 * at, range(6 * at, 6 * at + 6), None, 0) for at in range(3)]
    queries = torch.randn(3, 9, 64, generator=generator).bfloat16()
    keys, values = torch.randn(2, 3, 3, 64, generator=generator).bfloat16()
    backend = NativeAttention(cache, (None, None), threads=2)
    together = backend.plan(FlatBatch.of(chunks, 16, 40, 1)).attend(queries, keys, values, 1)
    for at, chunk in enumerate(chunks):
        row = slice(at, at + 1)
        alone = backend.plan(FlatBatch.of([chunk], 16, 40, 1)).attend(queries[row], keys[row], values[row], 1)
        assert torch.equal(alone, together[row])


def test_heads_of_other_sizes_are_left_to_torch() -> None:
    assert NativeAttention.supports(layout_of("bfloat16", 1, 64, 16))
    assert not NativeAttention.supports(layout_of("bfloat16", 1, 24, 16))
    assert not NativeAttention.supports(layout_of("float32", 1, 8, 16))
