"""One engine step: a flat batch of many sequences' tokens in, a drawn token for each sequence out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from engine.batch import FlatBatch
from engine.executor import Executor
from engine.logprobs import token_logprobs
from engine.sampler import Draw, sample
from engine.sequence import ChunkResult, ScheduledChunk


class ModelRunner:
    """The StepRunner that computes a model with `executor`."""

    def __init__(self, executor: Executor, block_size: int, num_blocks: int, vocab_size: int) -> None:
        self._executor = executor
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._vocab_size = vocab_size

    def step(
        self, chunks: Sequence[ScheduledChunk], on_layer: Callable[[int], None] | None = None
    ) -> list[ChunkResult]:
        if not chunks:
            return []
        batch = FlatBatch.of(chunks, self._block_size, self._num_blocks, self._vocab_size)
        logits = self._executor.logits(batch, on_layer)
        return _results(chunks, batch, logits, _drawn(chunks, batch, logits))


def _drawn(chunks: Sequence[ScheduledChunk], batch: FlatBatch, logits: torch.Tensor) -> list[int | None]:
    """Each chunk's token, where one is to be drawn."""
    draws = [
        Draw(chunk.sampling, chunk.start + len(chunk.token_ids), chunk.num_output_tokens, chunk.history)
        for chunk in chunks
        if chunk.sampling is not None
    ]
    if len(draws) < len(batch.wanted):  # prompt tokens are scored, too
        last_rows = batch.query_starts[1:][[chunk.sampling is not None for chunk in chunks]] - 1
        logits = logits[torch.from_numpy(np.searchsorted(batch.wanted, last_rows)).to(logits.device)]
    tokens = iter(sample(logits, draws))
    return [None if chunk.sampling is None else next(tokens) for chunk in chunks]


def _results(
    chunks: Sequence[ScheduledChunk], batch: FlatBatch, logits: torch.Tensor, tokens: Sequence[int | None]
) -> list[ChunkResult]:
    """The drawn tokens, with the log-probabilities that the chunks ask for."""
    firsts = batch.query_starts.tolist()
    wishes = [_wishes(*each) for each in zip(chunks, firsts, tokens, strict=False)]
    if not any(wishes):
        return [ChunkResult(token) for token in tokens]
    rows, token_ids, num_top = zip(*(wish for of_chunk in wishes for wish in of_chunk), strict=True)
    found = iter(token_logprobs(logits, np.searchsorted(batch.wanted, rows), token_ids, num_top))
    results: list[ChunkResult] = []
    for chunk, token, of_chunk in zip(chunks, tokens, wishes, strict=True):
        scored = tuple(next(found) for _ in of_chunk)
        asked = chunk.sampling is not None and chunk.sampling.logprobs is not None
        results.append(
            ChunkResult(token, scored[-1], scored[:-1]) if asked else ChunkResult(token, None, scored)
        )
    return results


def _wishes(chunk: ScheduledChunk, first_row: int, token: int | None) -> list[tuple[int, int, int]]:
    """(row, the token after it, how many of the most likely ones): prompt tokens, then the one drawn."""
    wishes: list[tuple[int, int, int]] = []
    if chunk.prompt_logprobs is not None:
        following = list(chunk.token_ids[1:]) + ([] if chunk.next_token is None else [chunk.next_token])
        wishes += [(first_row + at, token_id, chunk.prompt_logprobs) for at, token_id in enumerate(following)]
    if token is not None and chunk.sampling is not None and chunk.sampling.logprobs is not None:
        wishes.append((first_row + len(chunk.token_ids) - 1, token, chunk.sampling.logprobs))
    return wishes
