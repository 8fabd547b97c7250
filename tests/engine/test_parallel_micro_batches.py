"""A step cut into micro-batches is the same step."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.attention.sdpa import SdpaAttention
from engine.batch import FlatBatch
from engine.config import EngineConfig, ModelConfig
from engine.kernels.torch_ops import TorchKernels
from engine.kv_cache import KvCache
from engine.layout import KvLayout
from engine.model import LlamaModel
from engine.parallel.base import Solo
from engine.parallel.micro_batches import split
from engine.sequence import ScheduledChunk, TokenSampling
from engine.shard import WHOLE
from engine.weights import load_weights

BLOCK_SIZE = 4
NUM_BLOCKS = 64
VOCAB_SIZE = 160
SAMPLING = TokenSampling(
    temperature=0, top_k=0, top_p=1.0, seed=0, max_tokens=9, min_tokens=0, stop_token_ids=frozenset()
)


@st.composite
def steps(draw: st.DrawFn) -> FlatBatch:
    """Chunks of sequences with blocks of their own, somewhere in their sequence."""
    chunks = []
    free = draw(st.permutations(range(NUM_BLOCKS)))
    for _ in range(draw(st.integers(1, 5))):
        start, length = draw(st.integers(0, 9)), draw(st.integers(1, 12))
        count = -(-(start + length) // BLOCK_SIZE)
        table, free = free[:count], free[count:]
        tokens = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=length, max_size=length))
        scored = draw(st.sampled_from([None, None, 0]))
        sampling = draw(st.sampled_from([None, SAMPLING]))
        chunks.append(ScheduledChunk(tokens, start, table, sampling, 0, prompt_logprobs=scored))
    return FlatBatch.of(chunks, BLOCK_SIZE, NUM_BLOCKS, VOCAB_SIZE)


def rows_of(batch: FlatBatch) -> list[tuple[int, int, int, bool]]:
    """Row by row, the long way: (token, position, first block of its sequence, whether it is wanted)."""
    rows = []
    for chunk in range(batch.num_chunks):
        for row in range(batch.query_starts[chunk], batch.query_starts[chunk + 1]):
            rows.append(
                (
                    int(batch.token_ids[row]),
                    int(batch.positions[row]),
                    int(batch.block_tables[chunk, 0]),
                    row in batch.wanted.tolist(),
                )
            )
    return rows


@given(steps(), st.integers(1, 6))
def test_parts_are_the_whole_in_order(batch: FlatBatch, parts: int) -> None:
    found = split(batch, parts)
    sizes = [part.num_tokens for part in found]
    assert len(found) == min(parts, batch.num_tokens)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 0
    assert [row for part in found for row in rows_of(part)] == rows_of(batch)


@given(steps(), st.integers(1, 6))
def test_every_part_is_a_batch(batch: FlatBatch, parts: int) -> None:
    tables = {int(table[0]): table.tolist() for table in batch.block_tables}
    for part in split(batch, parts):
        assert part.query_starts[0] == 0
        assert part.query_starts[-1] == part.num_tokens
        assert (part.query_lens > 0).all()
        assert part.block_tables.shape[0] == part.num_chunks
        assert part.wanted.tolist() == sorted(part.wanted.tolist())
        for chunk, (first, last) in enumerate(pairwise(part.query_starts.tolist())):
            assert np.diff(part.positions[first:last]).tolist() == [1] * (last - first - 1)
            assert part.context_lens[chunk] == part.positions[last - 1] + 1
            assert part.block_tables[chunk].tolist() == tables[int(part.block_tables[chunk, 0])]
        types = {name: getattr(part, name).dtype for name in ("query_starts", "context_lens", "block_tables")}
        assert set(types.values()) == {np.dtype(np.int32)}, types
        assert part.wanted.dtype == part.positions.dtype == np.int64


@pytest.mark.parametrize("parts", [2, 3, 50])
def test_logits_of_the_parts_are_those_of_the_whole(random_checkpoint: Path, parts: int) -> None:
    """A prefill and its continuation, each of two sequences; the second step reads what the first stored."""
    whole, cut = Local(random_checkpoint), Local(random_checkpoint)
    first, second = range(0, 30), range(60, 100)
    tables = (range(3, 20), range(30, 50))
    for chunks in (
        [
            ScheduledChunk(first[:20], 0, tables[0], SAMPLING, 0, prompt_logprobs=0),
            ScheduledChunk(second[:9], 0, tables[1], None, 0),
        ],
        [
            ScheduledChunk(second[9:], 9, tables[1], SAMPLING, 0),
            ScheduledChunk(first[20:21], 20, tables[0], SAMPLING, 1),
        ],
    ):
        batch = FlatBatch.of(chunks, BLOCK_SIZE, NUM_BLOCKS, VOCAB_SIZE)
        expected = whole.logits(batch)
        found = torch.cat([cut.logits(part) for part in split(batch, parts)])
        assert expected.shape == (len(batch.wanted), VOCAB_SIZE)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


class Local:
    """A model on torch's kernels, with a KV cache of its own."""

    def __init__(self, path: Path) -> None:
        config = ModelConfig.from_pretrained(path)
        engine = EngineConfig(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
        weights = load_weights(path, config, torch.float32, lambda fraction: None)
        self._model = LlamaModel(config, WHOLE, weights, TorchKernels(), Solo())
        self._attention = SdpaAttention(KvCache(KvLayout.of(config, engine), NUM_BLOCKS), config.windows)

    @torch.inference_mode()
    def logits(self, batch: FlatBatch, on_layer: object = None) -> torch.Tensor:
        hidden = self._model.embed(torch.from_numpy(batch.token_ids))
        hidden = self._model.forward(hidden, torch.from_numpy(batch.positions), self._attention.plan(batch))
        return self._model.logits(hidden[torch.from_numpy(batch.wanted)])
