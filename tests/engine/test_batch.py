"""The flat batch of any chunks against one that is put together token by token, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import FlatBatch
from engine.errors import InvalidStepError
from engine.sequence import ScheduledChunk, TokenSampling

NUM_BLOCKS, VOCAB_SIZE = 50, 30
SAMPLING = TokenSampling(
    temperature=0, top_k=0, top_p=1.0, seed=0, max_tokens=9, min_tokens=0, stop_token_ids=frozenset()
)


@st.composite
def chunks(draw: st.DrawFn, block_size: int) -> ScheduledChunk:
    token_ids = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=12))
    start = draw(st.integers(0, 20))
    num_blocks = -(-(start + len(token_ids)) // block_size) + draw(st.integers(0, 3))
    # Some block tables are ranges, and some longer than they need to be.
    table = draw(
        st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=num_blocks, max_size=num_blocks)
        | st.integers(0, NUM_BLOCKS - num_blocks).map(lambda first: range(first, first + num_blocks))
    )
    return ScheduledChunk(token_ids, start, table, draw(st.sampled_from([None, SAMPLING])), 0)


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[ScheduledChunk], int]:
    block_size = draw(st.integers(1, 8))
    return draw(st.lists(chunks(block_size), min_size=1, max_size=8)), block_size


@given(steps())
def test_a_batch_is_its_chunks_token_by_token(step: tuple[list[ScheduledChunk], int]) -> None:
    scheduled, block_size = step
    batch = FlatBatch.of(scheduled, block_size, NUM_BLOCKS, VOCAB_SIZE)
    token_ids: list[int] = []
    positions: list[int] = []
    blocks: list[int] = []
    offsets: list[int] = []
    wanted: list[int] = []
    for index, chunk in enumerate(scheduled):
        assert batch.query_starts[index] == len(token_ids)
        for at, token_id in enumerate(chunk.token_ids):
            position = chunk.start + at
            token_ids.append(token_id)
            positions.append(position)
            blocks.append(chunk.block_table[position // block_size])
            offsets.append(position % block_size)
        if chunk.sampling is not None:
            wanted.append(len(token_ids) - 1)
        context = chunk.start + len(chunk.token_ids)
        assert batch.query_lens[index] == len(chunk.token_ids)
        assert batch.context_lens[index] == context
        used = -(-context // block_size)
        assert batch.block_tables[index, :used].tolist() == list(chunk.block_table[:used])
        assert not batch.block_tables[index, used:].any()
    assert batch.query_starts[-1] == batch.num_tokens == len(token_ids)
    assert batch.num_chunks == len(scheduled)
    assert batch.is_decode == all(len(chunk.token_ids) == 1 for chunk in scheduled)
    assert batch.token_ids.tolist() == token_ids
    assert batch.positions.tolist() == positions
    assert [array.tolist() for array in batch.places(block_size)] == [blocks, offsets]
    assert batch.wanted.tolist() == wanted
    assert batch.block_tables.shape[1] == -(-int(batch.context_lens.max()) // block_size)


def test_the_arrays_have_the_types_that_backends_count_on() -> None:
    chunk = ScheduledChunk((3, 4), 7, range(5), SAMPLING, 0)
    batch = FlatBatch.of([chunk, chunk], 4, NUM_BLOCKS, VOCAB_SIZE)
    assert {array.dtype for array in (batch.token_ids, batch.positions, batch.wanted)} == {np.dtype(np.int64)}
    small = (batch.query_starts, batch.context_lens, batch.block_tables, batch.query_lens)
    assert {array.dtype for array in small} == {np.dtype(np.int32)}
    assert all(array.flags.c_contiguous for array in small)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (ScheduledChunk([], 0, [0], None, 0), "a chunk of 0 tokens from position 0 .* must have a token"),
        (ScheduledChunk([1], 8, [0], None, 0), "from position 8 with 1 blocks of 8 tokens.* must cover it"),
        (ScheduledChunk([1] * 9, 0, [0], None, 0), "a chunk of 9 tokens .* must cover it"),
        (ScheduledChunk([1], 0, [], None, 0), "with 0 blocks .* must cover it"),
        (ScheduledChunk([1], -1, [0], None, 0), "from position -1"),
        (
            ScheduledChunk([1], 0, [NUM_BLOCKS], None, 0),
            r"blocks \d+ to 50: there are only the blocks 0 to 49",
        ),
        (ScheduledChunk([1], 0, [-1], None, 0), "the blocks -1 to"),
        (ScheduledChunk([VOCAB_SIZE], 0, [1], None, 0), r"token ids from \d+ to 30: the vocabulary has 30"),
        (ScheduledChunk([-1], 0, [1], None, 0), "token ids from -1"),
    ],
)
def test_a_chunk_that_cannot_be_run_is_refused(bad: ScheduledChunk, message: str) -> None:
    good = ScheduledChunk([1, 2], 0, [0], None, 0)
    for step in ([bad], [good, bad], [bad, good]):
        with pytest.raises(InvalidStepError, match=message):
            FlatBatch.of(step, 8, NUM_BLOCKS, VOCAB_SIZE)


def test_blocks_beyond_those_that_are_used_are_not_looked_at() -> None:
    chunk = ScheduledChunk([1], 0, [3, NUM_BLOCKS + 7], None, 0)
    assert FlatBatch.of([chunk], 8, NUM_BLOCKS, VOCAB_SIZE).block_tables.tolist() == [[3]]
