"""From a flat batch to logits: the part of a step that may be spread over ranks or recorded in a graph."""

from __future__ import annotations

from typing import Protocol

import torch

from engine.attention.base import AttentionBackend
from engine.batch import FlatBatch
from engine.model import LlamaModel


class Executor(Protocol):
    """Runs the model of one worker, whatever it is spread over."""

    def logits(self, batch: FlatBatch) -> torch.Tensor:
        """Store the KV of the batch's tokens; float32 [num_wanted, vocab_size] after its wanted rows."""
        ...


class LocalExecutor:
    """One process, one device, all layers."""

    def __init__(self, model: LlamaModel, attention: AttentionBackend) -> None:
        self._model = model
        self._attention = attention

    @torch.inference_mode()
    def logits(self, batch: FlatBatch) -> torch.Tensor:
        step_attention = self._attention.plan(batch)
        hidden = self._model.embed(torch.from_numpy(batch.token_ids))
        hidden = self._model.forward(hidden, torch.from_numpy(batch.positions), step_attention)
        return self._model.logits(hidden[torch.from_numpy(batch.wanted)])
