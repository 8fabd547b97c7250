"""The torch backend against the reference, on random mixtures of chunks over a random cache."""

from __future__ import annotations

import random

import pytest
import torch

from engine.attention.reference import ReferenceAttention
from engine.attention.sdpa import SdpaAttention
from engine.batch import FlatBatch
from engine.kv_cache import KvCache
from engine.layout import KvLayout
from engine.sequence import ScheduledChunk


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_sdpa_is_the_reference(num_heads: int, num_kv_heads: int, seed: int) -> None:
    dice = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    layout = KvLayout(num_layers=2, num_kv_heads=num_kv_heads, head_dim=8, block_size=4, dtype="float32")
    blocks = dice.sample(range(40), 40)
    lengths = [dice.choice([1, 1, 1, 3, 9]) for _ in range(6)]
    chunks = [
        ScheduledChunk([0] * length, dice.randint(0, 12), blocks[index * 6 : index * 6 + 6], None, 0)
        for index, length in enumerate(lengths)
    ]
    batch = FlatBatch.of(chunks, layout.block_size, 40, vocab_size=1)
    windows = (None, 5)
    caches = KvCache(layout, 40), KvCache(layout, 40)
    for cache in caches:
        cache.data.copy_(torch.randn(cache.data.shape, generator=generator.manual_seed(seed)))
    steps = (
        SdpaAttention(caches[0], windows).plan(batch),
        ReferenceAttention(caches[1], windows).plan(batch),
    )
    for layer in (1, 0):
        queries = torch.randn(sum(lengths), num_heads, 8, generator=generator)
        keys, values = torch.randn(2, sum(lengths), num_kv_heads, 8, generator=generator)
        attended, expected = (step.attend(queries, keys, values, layer) for step in steps)
        torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(caches[0].data, caches[1].data)
