"""One engine step: a flat batch of many sequences' tokens in, a drawn token for each sequence out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch

from engine.attention.base import AttentionBackend, Span
from engine.errors import InvalidStepError
from engine.model import LlamaModel
from engine.sampler import Draw, sample
from engine.sequence import ScheduledChunk


class StepRunner(Protocol):
    """Runs steps, and is all that a scheduler knows of an engine: a ModelRunner, or fake.FakeRunner."""

    def step(self, chunks: Sequence[ScheduledChunk]) -> list[int | None]:
        """Compute and store the chunks' KV; draw the token that follows where `chunk.sampling` is set.

        Returns one entry a chunk, in order. Raises InvalidStepError for chunks that cannot be run; nothing
        was stored then.
        """
        ...


class ModelRunner:
    """The StepRunner that computes a model, on the KV cache that `attention` works over."""

    def __init__(self, model: LlamaModel, attention: AttentionBackend) -> None:
        self._model = model
        self._attention = attention

    def step(self, chunks: Sequence[ScheduledChunk]) -> list[int | None]:
        if not chunks:
            return []
        drawing = [index for index, chunk in enumerate(chunks) if chunk.sampling is not None]
        logits = self.logits(chunks, drawing)
        draws = [
            Draw(chunk.sampling, chunk.start + len(chunk.token_ids), chunk.num_output_tokens)
            for chunk in chunks
            if chunk.sampling is not None
        ]
        tokens: list[int | None] = [None] * len(chunks)
        for index, token in zip(drawing, sample(logits, draws), strict=True):
            tokens[index] = token
        return tokens

    @torch.inference_mode()
    def logits(self, chunks: Sequence[ScheduledChunk], wanted: Sequence[int]) -> torch.Tensor:
        """Run the chunks; float32 [len(wanted), vocab_size] for what follows the chunks of these indices."""
        ends = list(accumulate(len(chunk.token_ids) for chunk in chunks))
        spans = [Span(end - len(chunk.token_ids), chunk) for chunk, end in zip(chunks, ends, strict=True)]
        step_attention = self._attention.plan(spans)
        token_ids = np.concatenate([np.asarray(chunk.token_ids, dtype=np.int64) for chunk in chunks])
        vocab_size = self._model.config.vocab_size
        if token_ids.min() < 0 or token_ids.max() >= vocab_size:
            raise InvalidStepError(
                f"token ids from {token_ids.min()} to {token_ids.max()}: the vocabulary has {vocab_size}"
            )
        positions = np.concatenate(
            [np.arange(chunk.start, chunk.start + len(chunk.token_ids)) for chunk in chunks]
        )
        hidden = self._model.forward(torch.from_numpy(token_ids), torch.from_numpy(positions), step_attention)
        return self._model.logits(hidden[[ends[index] - 1 for index in wanted]])
