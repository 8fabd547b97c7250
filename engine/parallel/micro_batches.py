"""One step cut into parts that follow each other through the pipeline's stages. No torch here."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from engine.batch import FlatBatch


def split(batch: FlatBatch, parts: int) -> list[FlatBatch]:
    """The batch as up to `parts` batches of equally many tokens, to be run in order; none is empty.

    A chunk that lies across a border is cut in two: its later tokens find the earlier ones stored, as a stage
    runs the parts one after the other. The parts' wanted rows, in order, are those of the batch.
    """
    parts = min(parts, batch.num_tokens)
    borders = [batch.num_tokens * part // parts for part in range(parts + 1)]
    return [_rows(batch, first, last) for first, last in pairwise(borders)]


def _rows(batch: FlatBatch, first: int, last: int) -> FlatBatch:
    """The tokens first .. last - 1 as a batch of their own."""
    starts = batch.query_starts
    first_chunk = int(np.searchsorted(starts, first, side="right")) - 1
    last_chunk = int(np.searchsorted(starts, last, side="left"))
    query_starts = np.clip(starts[first_chunk : last_chunk + 1], first, last) - first
    wanted = batch.wanted[(batch.wanted >= first) & (batch.wanted < last)] - first
    return FlatBatch(
        token_ids=batch.token_ids[first:last],
        positions=batch.positions[first:last],
        query_starts=query_starts.astype(np.int32),
        # A sequence ends, for this part, with the last of its tokens here.
        context_lens=(batch.positions[first:last][query_starts[1:] - 1] + 1).astype(np.int32),
        block_tables=np.ascontiguousarray(batch.block_tables[first_chunk:last_chunk]),
        wanted=wanted,
    )
