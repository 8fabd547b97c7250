"""A step as bytes: what the leader of a worker broadcasts to its ranks. No pickle, no torch.

A message is a header and the raw arrays of one FlatBatch after the other, all little-endian. Ranks are of one
worker and one version; what does not parse is a mistake or an intruder, and is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from engine.batch import FlatBatch
from engine.errors import InvalidStepError

Number = TypeVar("Number", np.int64, np.int32)

_MAGIC = 0x50524C59  # "PRLY"
_VERSION = 1
_HEADER = struct.Struct("<IHH")  # magic, version, number of batches
_SIZES = struct.Struct("<IIII")  # tokens, chunks, columns of the block tables, wanted rows

STOP = _HEADER.pack(_MAGIC, _VERSION, 0)
"""The message that ends a rank."""


def encode(batches: Sequence[FlatBatch]) -> bytes:
    """The micro-batches of one step; at least one."""
    parts = [_HEADER.pack(_MAGIC, _VERSION, len(batches))]
    for batch in batches:
        columns = batch.block_tables.shape[1]
        parts.append(_SIZES.pack(batch.num_tokens, batch.num_chunks, columns, len(batch.wanted)))
        parts += [np.ascontiguousarray(array).tobytes() for array in _arrays(batch)]
    return b"".join(parts)


def decode(message: bytes) -> list[FlatBatch]:
    """What `encode` was given; empty for STOP. Raises InvalidStepError for anything else."""
    try:
        magic, version, count = _HEADER.unpack_from(message)
        if (magic, version) != (_MAGIC, _VERSION):
            raise InvalidStepError(
                f"a step of version {_VERSION} is needed, not {version} (magic {magic:#x})"
            )
        offset = _HEADER.size
        batches = []
        for _ in range(count):
            sizes = _SIZES.unpack_from(message, offset)
            batch, offset = _decode_one(message, offset + _SIZES.size, *sizes)
            batches.append(batch)
    except (struct.error, ValueError) as error:
        raise InvalidStepError(f"a step of {len(message)} bytes is cut off: {error}") from error
    if offset != len(message):
        raise InvalidStepError(f"a step of {len(message)} bytes has {len(message) - offset} bytes too many")
    return batches


def _decode_one(
    message: bytes, offset: int, num_tokens: int, num_chunks: int, columns: int, num_wanted: int
) -> tuple[FlatBatch, int]:
    def take(dtype: type[Number], count: int) -> npt.NDArray[Number]:
        nonlocal offset
        # A copy: torch wants memory that may be written.
        array = np.frombuffer(message, dtype, count, offset).copy()
        offset += array.nbytes
        return array

    batch = FlatBatch(
        token_ids=take(np.int64, num_tokens),
        positions=take(np.int64, num_tokens),
        query_starts=take(np.int32, num_chunks + 1),
        context_lens=take(np.int32, num_chunks),
        block_tables=take(np.int32, num_chunks * columns).reshape(num_chunks, columns),
        wanted=take(np.int64, num_wanted),
    )
    return batch, offset


def _arrays(batch: FlatBatch) -> tuple[npt.NDArray[np.int64] | npt.NDArray[np.int32], ...]:
    return (
        batch.token_ids,
        batch.positions,
        batch.query_starts,
        batch.context_lens,
        batch.block_tables,
        batch.wanted,
    )
