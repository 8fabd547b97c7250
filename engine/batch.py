"""One step's tokens as arrays: built once from the scheduled chunks, read by every layer. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from engine.errors import InvalidStepError
from engine.sequence import ScheduledChunk


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """The chunks' tokens, one chunk after the other, and where each chunk's sequence lies in the KV cache.

    token_ids, positions: int64 [num_tokens]; position counts from the start of the token's sequence.
    query_starts: int32 [num_chunks + 1]; chunk i's tokens are the rows from query_starts[i] to before
    query_starts[i + 1].
    context_lens: int32 [num_chunks]; tokens of each sequence that are stored after this step, the new ones
    included.
    block_tables: int32 [num_chunks, blocks of the longest context], padded with 0.
    wanted: int64 [num_wanted], ascending; the rows after which logits are asked for.
    """

    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    query_starts: npt.NDArray[np.int32]
    context_lens: npt.NDArray[np.int32]
    block_tables: npt.NDArray[np.int32]
    wanted: npt.NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_chunks(self) -> int:
        return len(self.context_lens)

    @property
    def query_lens(self) -> npt.NDArray[np.int32]:
        """int32 [num_chunks]: new tokens of each chunk."""
        return np.diff(self.query_starts)

    @property
    def is_decode(self) -> bool:
        """Whether every chunk is a single token."""
        return self.num_tokens == self.num_chunks

    def places(self, block_size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Block, and offset in it, of each new token: int64 [num_tokens] each."""
        chunk_of_row = np.repeat(np.arange(self.num_chunks), self.query_lens)
        blocks = self.block_tables[chunk_of_row, self.positions // block_size]
        return blocks.astype(np.int64), self.positions % block_size

    @classmethod
    def of(
        cls, chunks: Sequence[ScheduledChunk], block_size: int, num_blocks: int, vocab_size: int
    ) -> FlatBatch:
        """Check the chunks and lay them out; logits are wanted where a token is drawn and where prompt tokens
        are scored.

        Raises InvalidStepError for a chunk without tokens, one that its block table does not cover, and for
        tokens or blocks that do not exist.
        """
        lengths = np.array([len(chunk.token_ids) for chunk in chunks], dtype=np.int64)
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
        table_lens = np.array([len(chunk.block_table) for chunk in chunks], dtype=np.int64)
        context_lens = starts + lengths
        wrong = (lengths == 0) | (starts < 0) | (context_lens > table_lens * block_size)
        if wrong.any():
            at = int(wrong.argmax())
            raise InvalidStepError(
                f"a chunk of {lengths[at]} tokens from position {starts[at]} with {table_lens[at]} blocks of "
                f"{block_size} tokens: it must have a token, and its block table must cover it"
            )
        query_starts = np.concatenate(([0], lengths.cumsum()))
        num_tokens = int(query_starts[-1])
        token_ids = np.fromiter(
            chain.from_iterable(chunk.token_ids for chunk in chunks), dtype=np.int64, count=num_tokens
        )
        if token_ids.min() < 0 or token_ids.max() >= vocab_size:
            raise InvalidStepError(
                f"token ids from {token_ids.min()} to {token_ids.max()}: the vocabulary has {vocab_size}"
            )
        return cls(
            token_ids=token_ids,
            positions=np.arange(num_tokens) + np.repeat(starts - query_starts[:-1], lengths),
            query_starts=query_starts.astype(np.int32),
            context_lens=context_lens.astype(np.int32),
            block_tables=_block_tables(chunks, -(-context_lens // block_size), num_blocks),
            wanted=_wanted(chunks, query_starts),
        )


def _wanted(chunks: Sequence[ScheduledChunk], query_starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows before a token that is drawn, and before a prompt token that is scored."""
    rows = query_starts[1:][[chunk.sampling is not None for chunk in chunks]] - 1
    scored = [
        np.arange(start, start + len(chunk.token_ids) - (chunk.next_token is None))
        for chunk, start in zip(chunks, query_starts, strict=False)
        if chunk.prompt_logprobs is not None
    ]
    return np.unique(np.concatenate((rows, *scored))) if scored else rows


def _block_tables(
    chunks: Sequence[ScheduledChunk], used: npt.NDArray[np.int64], num_blocks: int
) -> npt.NDArray[np.int32]:
    """Each chunk's first `used` blocks, one row a chunk."""
    flat = np.concatenate(
        [
            np.asarray(chunk.block_table[:count], dtype=np.int64)
            for chunk, count in zip(chunks, used.tolist(), strict=True)
        ]
    )
    if flat.min() < 0 or flat.max() >= num_blocks:
        raise InvalidStepError(
            f"a block table with the blocks {flat.min()} to {flat.max()}: there are only the blocks 0 to "
            f"{num_blocks - 1}"
        )
    tables = np.zeros((len(chunks), int(used.max())), dtype=np.int32)
    tables[np.arange(tables.shape[1]) < used[:, None]] = flat
    return tables
