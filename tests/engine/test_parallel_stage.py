"""Two stages of one rank each in threads of one process, around a model that only hands rows on."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.batch import FlatBatch
from engine.parallel.micro_batches import split
from engine.parallel.stage import Stage
from engine.sequence import ScheduledChunk, TokenSampling
from engine.shard import Shard

GREEDY = TokenSampling(
    temperature=0, top_k=0, top_p=1.0, seed=0, max_tokens=1, min_tokens=0, stop_token_ids=frozenset()
)
CPU = torch.device("cpu")


class Wires:
    """The messages between all ranks; `waiting` is set as soon as the leader waits for one."""

    def __init__(self) -> None:
        self.queues: dict[tuple[int, int, int], Queue[torch.Tensor]] = defaultdict(Queue)
        self.waiting = threading.Event()


class World:
    """engine.parallel.groups.DistributedGroup, as far as a stage uses the world group."""

    def __init__(self, wires: Wires, rank: int) -> None:
        self._wires = wires
        self._rank = rank

    def send(self, tensor: torch.Tensor, to_rank: int, tag: int) -> None:
        self._wires.queues[self._rank, to_rank, tag].put(tensor.clone())

    def sent(self, sending: object) -> None:
        pass

    def receive(self, tensor: torch.Tensor, from_rank: int, tag: int) -> torch.Tensor:
        if self._rank == 0:
            self._wires.waiting.set()
        return tensor.copy_(self._wires.queues[from_rank, self._rank, tag].get(timeout=60))


class Model:
    """Rows of token ids, one more in each layer; this is also the first of their logits."""

    config = SimpleNamespace(hidden_size=1, vocab_size=2)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return token_ids[:, None].float()

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        attention: object,
        on_layer: Callable[[int], None],
    ) -> torch.Tensor:
        return hidden + 1

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([hidden, torch.zeros_like(hidden)], dim=1)


def stage(wires: Wires, rank: int) -> Stage:
    attention: Any = SimpleNamespace(plan=lambda batch: None)
    model: Any = Model()
    world: Any = World(wires, rank)
    return Stage(model, attention, Shard(0, 1, rank, 2), world, torch.float32, CPU)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [(None, []), (GREEDY, [[9.0, 0.0]])],
    ids=["no answer wanted", "an answer wanted"],
)
def test_a_step_is_over_when_the_last_stage_is_done_with_it(
    sampling: TokenSampling | None, expected: list[list[float]]
) -> None:
    """Its KV is offered to decode workers, and its blocks are given to others, as soon as a step returns."""
    chunk = ScheduledChunk([3, 4, 5, 6, 7], 0, [1, 0], sampling, 0)
    batches = split(FlatBatch.of([chunk], 4, 2, 100), 2)
    wires = Wires()
    with ThreadPoolExecutor() as threads:
        leader = threads.submit(stage(wires, 0).run, batches)
        assert wires.waiting.wait(60)
        assert not leader.done()
        assert stage(wires, 1).run(batches) is None
        logits = leader.result(60)
    assert logits is not None
    assert logits.tolist() == expected
    assert all(queue.empty() for queue in wires.queues.values())
