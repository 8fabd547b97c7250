"""A step as bytes, there and back; and everything that is no step is refused."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import FlatBatch
from engine.errors import InvalidStepError
from engine.parallel.codec import STOP, decode, encode

INT64 = st.integers(-(2**63), 2**63 - 1)
INT32 = st.integers(-(2**31), 2**31 - 1)


@st.composite
def batches(draw: st.DrawFn) -> FlatBatch:
    """Arrays of fitting shapes with any values; the codec knows no more of a batch."""
    tokens, chunks, columns, wanted = (draw(st.integers(0, 5)) for _ in range(4))

    def array(kind: type[np.int64] | type[np.int32], count: int) -> np.ndarray:
        values = st.lists(INT64 if kind is np.int64 else INT32, min_size=count, max_size=count)
        return np.array(draw(values), dtype=kind)

    return FlatBatch(
        token_ids=array(np.int64, tokens),
        positions=array(np.int64, tokens),
        query_starts=array(np.int32, chunks + 1),
        context_lens=array(np.int32, chunks),
        block_tables=array(np.int32, chunks * columns).reshape(chunks, columns),
        wanted=array(np.int64, wanted),
    )


def small_batch() -> FlatBatch:
    return FlatBatch(
        token_ids=np.array([5, 6, 7]),
        positions=np.array([0, 1, 9]),
        query_starts=np.array([0, 2, 3], dtype=np.int32),
        context_lens=np.array([2, 10], dtype=np.int32),
        block_tables=np.array([[4, 0], [2, 3]], dtype=np.int32),
        wanted=np.array([1, 2]),
    )


def assert_equal(found: FlatBatch, expected: FlatBatch) -> None:
    for field in dataclasses.fields(FlatBatch):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert one.dtype == other.dtype, field.name
        np.testing.assert_array_equal(one, other, err_msg=field.name, strict=True)
        assert one.flags.writeable, field.name  # torch warns of memory that may not be written


@given(st.lists(batches(), min_size=1, max_size=4))
def test_a_step_comes_back_as_it_was(step: list[FlatBatch]) -> None:
    found = decode(encode(step))
    assert len(found) == len(step)
    for one, other in zip(found, step, strict=True):
        assert_equal(one, other)


def test_arrays_that_are_views_of_others_come_back() -> None:
    """As the micro-batches are: rows of the whole batch's arrays, not contiguous in block tables."""
    batch = small_batch()
    wide = np.arange(12, dtype=np.int32).reshape(2, 6)
    batch = dataclasses.replace(batch, block_tables=wide[:, ::2], token_ids=np.arange(6)[::2])
    (found,) = decode(encode([batch]))
    assert_equal(found, batch)


def test_stop_is_no_batch() -> None:
    assert decode(STOP) == []


def test_every_truncation_is_refused() -> None:
    message = encode([small_batch(), small_batch()])
    for length in range(len(message)):
        with pytest.raises(InvalidStepError, match="cut off"):
            decode(message[:length])


@given(st.binary(min_size=1, max_size=40))
def test_a_longer_message_is_refused(more: bytes) -> None:
    for message in (STOP, encode([small_batch()])):
        with pytest.raises(InvalidStepError, match=f"{len(more)} bytes too many"):
            decode(message + more)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(message: bytes) -> None:
    with pytest.raises(InvalidStepError):
        decode(message)


@pytest.mark.parametrize(("field", "value"), [("magic", 0x50524C58), ("version", 2)])
def test_a_foreign_header_is_refused(field: str, value: int) -> None:
    magic, version, count = struct.unpack_from("<IHH", encode([small_batch()]))
    header = {"magic": magic, "version": version} | {field: value}
    message = struct.pack("<IHH", header["magic"], header["version"], count)
    with pytest.raises(InvalidStepError, match="is needed"):
        decode(message + encode([small_batch()])[8:])


EXTREME = st.sampled_from([0, 1, 2**16, 2**30, 2**31 - 1, 2**31, 2**32 - 1])


@settings(max_examples=300)
@given(st.tuples(EXTREME, EXTREME, EXTREME, EXTREME), st.binary(max_size=64))
def test_lying_sizes_neither_allocate_nor_escape(sizes: tuple[int, int, int, int], body: bytes) -> None:
    """Up to 2^64 block numbers are announced: more than can be counted, let alone stored."""
    message = struct.pack("<IHH", 0x50524C59, 1, 1) + struct.pack("<IIII", *sizes) + body
    try:
        (batch,) = decode(message)
    except InvalidStepError:
        return
    assert sum(getattr(batch, field.name).nbytes for field in dataclasses.fields(batch)) == len(body)


@given(st.data())
def test_a_damaged_step_is_a_step_of_the_same_size_or_refused(data: st.DataObject) -> None:
    message = bytearray(encode([small_batch()]))
    message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode(bytes(message))
    except InvalidStepError:
        return
    assert not found or len(encode(found)) == len(message)
