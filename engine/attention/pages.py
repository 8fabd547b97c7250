"""A flat batch in the terms of a paged-attention library: which pages each sequence has. No torch here.

A page is a KV block. The pages of all sequences stand in one list, sequence after sequence, with an array
that says where each one's begin (compressed sparse rows), as FlashInfer (Ye et al. 2025) reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.batch import FlatBatch


@dataclass(frozen=True, slots=True)
class Pages:
    """All int32.

    query_indptr: [num_chunks + 1]; chunk i's new tokens are rows query_indptr[i] .. query_indptr[i+1] - 1.
    indptr: [num_chunks + 1]; chunk i's pages are indices[indptr[i] : indptr[i+1]].
    indices: [indptr[-1]], in order of position; the new tokens' pages included.
    last_lens: [num_chunks]; tokens in each chunk's last page, 1 .. block_size.
    chunk_of_row, positions: [num_tokens]; whose sequence each new token belongs to, and its place in it.
    """

    query_indptr: npt.NDArray[np.int32]
    indptr: npt.NDArray[np.int32]
    indices: npt.NDArray[np.int32]
    last_lens: npt.NDArray[np.int32]
    chunk_of_row: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]

    @classmethod
    def of(cls, batch: FlatBatch, block_size: int) -> Pages:
        """The pages of a batch whose block tables cover every context."""
        counts = -(-batch.context_lens // block_size)
        used = np.arange(batch.block_tables.shape[1]) < counts[:, None]
        return cls(
            query_indptr=batch.query_starts,
            indptr=np.concatenate(([0], counts.cumsum())).astype(np.int32),
            indices=batch.block_tables[used],
            last_lens=batch.context_lens - (counts - 1) * block_size,
            chunk_of_row=np.repeat(np.arange(batch.num_chunks, dtype=np.int32), batch.query_lens),
            positions=batch.positions.astype(np.int32),
        )
