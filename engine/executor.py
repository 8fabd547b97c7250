"""From a flat batch to logits: the part of a step that may be spread over ranks or recorded in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from engine.attention.base import AttentionBackend
from engine.batch import FlatBatch
from engine.model import LlamaModel
from engine.staging import to_device

_CPU = torch.device("cpu")


class Executor(Protocol):
    """Runs the model of one worker, whatever it is spread over."""

    def logits(self, batch: FlatBatch, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """Store the KV of the batch's tokens; float32 [num_wanted, vocab_size] after its wanted rows.

        on_layer: told, where that can be known while the step runs, of how many layers the KV is stored.
        """
        ...


class LocalExecutor:
    """One process, one device, all layers. The logits lie on `device`; the host does not wait for them."""

    def __init__(self, model: LlamaModel, attention: AttentionBackend, device: torch.device = _CPU) -> None:
        self._model = model
        self._attention = attention
        self._device = device

    @torch.inference_mode()
    def logits(self, batch: FlatBatch, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        if self._device.type != "cpu":
            on_layer = None  # the host is ahead of the device
        step_attention = self._attention.plan(batch)
        token_ids, positions, wanted = to_device(self._device, batch.token_ids, batch.positions, batch.wanted)
        hidden = self._model.forward(self._model.embed(token_ids), positions, step_attention, on_layer)
        return self._model.logits(hidden[wanted])
