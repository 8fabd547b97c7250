"""What one rank computes of a step: its layers, for one micro-batch after the other.

    stage 0   | embed, layers, send | embed, layers, send |
    stage 1                         | receive, layers, logits | receive, layers, logits |

Sending does not wait, so a stage computes its next micro-batch while the following stage computes the last
one. A step with m micro-batches on p stages keeps a stage busy for m of its m + p - 1 slots; the rest is the
bubble at its ends. A step is over when every rank has stored the KV of all its tokens, also where no logits
are wanted: whoever runs it may hand that KV on then, or give the blocks to somebody else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from engine.attention.base import AttentionBackend
from engine.batch import FlatBatch
from engine.model import LlamaModel
from engine.parallel.groups import DistributedGroup
from engine.shard import Shard
from engine.staging import to_device

LEADER = 0


class Stage:
    """One rank's part of the model, and its places to send to and receive from."""

    def __init__(
        self,
        model: LlamaModel,
        attention: AttentionBackend,
        shard: Shard,
        world: DistributedGroup,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._model = model
        self._attention = attention
        self._shard = shard
        self._world = world
        self._dtype = dtype
        self._device = device
        self._rank = shard.pp_rank * shard.tp_size + shard.tp_rank
        # In the place of logits, where none are wanted.
        self._done = torch.zeros(1, device=device)

    @torch.inference_mode()
    def run(
        self, batches: Sequence[FlatBatch], on_layer: Callable[[int], None] | None = None
    ) -> torch.Tensor | None:
        """Compute a step. On the leader: float32 [num_wanted of all batches, vocab_size]; elsewhere None.

        on_layer: see Executor.logits.
        """
        if self._shard.pp_size > 1 or self._device.type != "cpu":
            on_layer = None  # the host knows about its own layers only, and is ahead of a device
        sending: list[tuple[Any, torch.Tensor]] = []
        logits: list[torch.Tensor] = []
        for tag, batch in enumerate(batches):
            hidden, result = self._compute(batch, tag, on_layer)
            if not self._shard.is_last_stage:
                self._send(sending, hidden, self._rank + self._shard.tp_size, tag)
            elif self._shard.tp_rank == 0:
                if self._rank == LEADER:
                    logits.append(result)
                else:
                    self._send(sending, result if len(result) else self._done, LEADER, tag)
        if self._rank == LEADER and not self._shard.is_last_stage:
            logits = [self._receive_logits(batch, tag) for tag, batch in enumerate(batches)]
        for work, _ in sending:
            self._world.sent(work)
        return torch.cat(logits) if self._rank == LEADER else None

    def _compute(
        self, batch: FlatBatch, tag: int, on_layer: Callable[[int], None] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states after this stage, and logits: on the last one those that are wanted."""
        step = self._attention.plan(batch)
        token_ids, positions, wanted = to_device(self._device, batch.token_ids, batch.positions, batch.wanted)
        if self._shard.is_first_stage:
            hidden = self._model.embed(token_ids)
        else:
            shape = (batch.num_tokens, self._model.config.hidden_size)
            hidden = torch.empty(shape, dtype=self._dtype, device=self._device)
            self._world.receive(hidden, self._rank - self._shard.tp_size, tag)
        hidden = self._model.forward(hidden, positions, step, on_layer)
        if self._shard.is_last_stage and len(batch.wanted):
            return hidden, self._model.logits(hidden[wanted])
        return hidden, self._no_logits()

    def _send(
        self, sending: list[tuple[Any, torch.Tensor]], tensor: torch.Tensor, to_rank: int, tag: int
    ) -> None:
        tensor = tensor.contiguous()
        sending.append((self._world.send(tensor, to_rank, tag), tensor))

    def _receive_logits(self, batch: FlatBatch, tag: int) -> torch.Tensor:
        """Comes when the last stage is done with the batch."""
        sender = (self._shard.pp_size - 1) * self._shard.tp_size
        if not len(batch.wanted):
            self._world.receive(torch.empty_like(self._done), sender, tag)
            return self._no_logits()
        shape = (len(batch.wanted), self._model.config.vocab_size)
        logits = torch.empty(shape, dtype=torch.float32, device=self._device)
        return self._world.receive(logits, sender, tag)

    def _no_logits(self) -> torch.Tensor:
        return torch.empty((0, self._model.config.vocab_size), dtype=torch.float32, device=self._device)
