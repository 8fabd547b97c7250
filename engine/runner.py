"""One engine step: a flat batch of many sequences' tokens in, a drawn token for each sequence out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.batch import FlatBatch
from engine.executor import Executor
from engine.sampler import Draw, sample
from engine.sequence import ChunkResult, ScheduledChunk


class StepRunner(Protocol):
    """Runs steps, and is all that a scheduler knows of an engine: a ModelRunner, or fake.FakeRunner."""

    def step(self, chunks: Sequence[ScheduledChunk]) -> list[ChunkResult]:
        """Compute and store the chunks' KV; draw the token that follows where `chunk.sampling` is set.

        Returns one result a chunk, in order. Raises InvalidStepError for chunks that cannot be run; nothing
        was stored then.
        """
        ...


class ModelRunner:
    """The StepRunner that computes a model with `executor`."""

    def __init__(self, executor: Executor, block_size: int, num_blocks: int, vocab_size: int) -> None:
        self._executor = executor
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._vocab_size = vocab_size

    def step(self, chunks: Sequence[ScheduledChunk]) -> list[ChunkResult]:
        if not chunks:
            return []
        batch = FlatBatch.of(chunks, self._block_size, self._num_blocks, self._vocab_size)
        logits = self._executor.logits(batch)
        draws = [
            Draw(chunk.sampling, chunk.start + len(chunk.token_ids), chunk.num_output_tokens)
            for chunk in chunks
            if chunk.sampling is not None
        ]
        tokens = iter(sample(logits, draws))
        return [ChunkResult(None if chunk.sampling is None else next(tokens)) for chunk in chunks]
