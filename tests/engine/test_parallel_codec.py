"""Steps as bytes, and steps in parts: nothing is lost, and what is damaged is refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import FlatBatch
from engine.errors import InvalidStepError
from engine.parallel.codec import STOP, decode, encode
from engine.parallel.micro_batches import split
from engine.sequence import ScheduledChunk, TokenSampling

GREEDY = TokenSampling(
    temperature=0, top_k=0, top_p=1.0, seed=0, max_tokens=1, min_tokens=0, stop_token_ids=frozenset()
)
ARRAYS = ("token_ids", "positions", "query_starts", "context_lens", "block_tables", "wanted")


@st.composite
def batches(draw: st.DrawFn) -> FlatBatch:
    """Chunks of any size at any place, on any blocks."""
    chunks = []
    for _ in range(draw(st.integers(1, 6))):
        start, length = draw(st.integers(0, 40)), draw(st.integers(1, 12))
        table = draw(st.lists(st.integers(0, 99), min_size=13, max_size=20))
        tokens = draw(st.lists(st.integers(0, 999), min_size=length, max_size=length))
        chunks.append(ScheduledChunk(tokens, start, table, GREEDY if draw(st.booleans()) else None, 0))
    return FlatBatch.of(chunks, 4, 100, 1000)


def rows(batch: FlatBatch) -> list[tuple[int, int, int, int, bool]]:
    """What of each token matters: token, position, block, offset in it, and whether its logits are wanted."""
    blocks, offsets = batch.places(4)
    wanted = np.isin(np.arange(batch.num_tokens), batch.wanted)
    columns = (batch.token_ids, batch.positions, blocks, offsets, wanted)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@given(st.lists(batches(), min_size=1, max_size=3))
def test_what_is_encoded_is_decoded(steps: list[FlatBatch]) -> None:
    decoded = decode(encode(steps))
    assert len(decoded) == len(steps)
    for found, expected in zip(decoded, steps, strict=True):
        for name in ARRAYS:
            array = getattr(found, name)
            assert array.dtype == getattr(expected, name).dtype
            assert np.array_equal(array, getattr(expected, name))
            assert array.flags.writeable


def test_stop_is_no_batch() -> None:
    assert decode(STOP) == []


@given(batches(), st.data())
def test_a_message_that_is_cut_or_too_long_is_refused(batch: FlatBatch, data: st.DataObject) -> None:
    message = encode([batch])
    with pytest.raises(InvalidStepError):
        decode(message[: data.draw(st.integers(0, len(message) - 1))])
    with pytest.raises(InvalidStepError, match="1 bytes too many"):
        decode(message + b"\0")


@given(st.binary(max_size=80))
def test_foreign_bytes_are_refused(message: bytes) -> None:
    with pytest.raises(InvalidStepError):
        decode(message)


def test_lying_sizes_are_refused_before_anything_is_allocated() -> None:
    with pytest.raises(InvalidStepError, match="cut off"):
        decode(STOP[:6] + struct.pack("<H", 1) + struct.pack("<IIII", 2**32 - 1, 1, 1, 1))


@given(batches(), st.integers(1, 5))
def test_parts_are_the_batch_in_order(batch: FlatBatch, count: int) -> None:
    parts = split(batch, count)
    assert len(parts) == min(count, batch.num_tokens)
    assert [row for part in parts for row in rows(part)] == rows(batch)
    sizes = [part.num_tokens for part in parts]
    assert max(sizes) - min(sizes) <= 1
    for part in parts:
        assert part.query_starts[0] == 0
        assert part.query_starts[-1] == part.num_tokens
        assert (part.query_lens > 0).all()
        ends = part.positions[part.query_starts[1:] - 1] + 1
        assert part.context_lens.tolist() == ends.tolist()
