"""A model that is split over ranks against the whole one: the ranks are threads that meet at a barrier."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from engine.attention.sdpa import SdpaAttention
from engine.batch import FlatBatch
from engine.config import EngineConfig, ModelConfig
from engine.kernels.torch_ops import TorchKernels
from engine.kv_cache import KvCache
from engine.layout import KvLayout
from engine.model import LlamaModel
from engine.sequence import ScheduledChunk, TokenSampling
from engine.shard import Shard
from engine.weights import load_weights

SAMPLING = TokenSampling(
    temperature=0, top_k=0, top_p=1.0, seed=0, max_tokens=9, min_tokens=0, stop_token_ids=frozenset()
)
CONFIG = EngineConfig(num_blocks=20, block_size=8)


class Meeting:
    """What the ranks of one stage exchange."""

    def __init__(self, size: int) -> None:
        self.barrier = Barrier(size, timeout=60)
        self.parts: list[torch.Tensor] = [torch.empty(0)] * size


class Threads:
    """The TensorGroup of one rank among threads."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self._rank = rank
        self._meeting = meeting

    @property
    def size(self) -> int:
        return len(self._meeting.parts)

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._gather(partial)).sum(0)

    def concat(self, columns: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._gather(columns), dim=1)

    def _gather(self, part: torch.Tensor) -> list[torch.Tensor]:
        self._meeting.parts[self._rank] = part.clone()
        self._meeting.barrier.wait()
        parts = list(self._meeting.parts)
        self._meeting.barrier.wait()
        return parts


class Stage:
    """The ranks of one pipeline stage, each with its weights and its KV cache."""

    def __init__(self, path: Path, config: ModelConfig, tp_size: int, pp_rank: int, pp_size: int) -> None:
        meeting = Meeting(tp_size)
        self._pool = ThreadPoolExecutor(tp_size)
        self._ranks = []
        for tp_rank in range(tp_size):
            shard = Shard(tp_rank, tp_size, pp_rank, pp_size)
            weights = load_weights(path, config, torch.float32, lambda fraction: None, shard)
            layers = shard.layers(config)
            cache = KvCache(KvLayout.of(config, CONFIG, shard), CONFIG.num_blocks)
            attention = SdpaAttention(cache, config.windows[layers.start : layers.stop])
            model = LlamaModel(config, shard, weights, TorchKernels(), Threads(tp_rank, meeting))
            self._ranks.append((shard, model, attention))

    def run(self, batch: FlatBatch, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        """Every rank's hidden states, or logits in the last stage; hidden: those of the stage before."""
        return list(self._pool.map(lambda rank: self._run(rank, batch, hidden), range(len(self._ranks))))

    @torch.inference_mode()
    def _run(self, rank: int, batch: FlatBatch, hidden: list[torch.Tensor]) -> torch.Tensor:
        shard, model, attention = self._ranks[rank]
        own = model.embed(torch.from_numpy(batch.token_ids)) if shard.is_first_stage else hidden[rank].clone()
        own = model.forward(own, torch.from_numpy(batch.positions), attention.plan(batch))
        return model.logits(own[torch.from_numpy(batch.wanted)]) if shard.is_last_stage else own


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (4, 1), (1, 3), (2, 2)])
def test_a_split_model_computes_what_the_whole_one_does(checkpoint: Path, tp_size: int, pp_size: int) -> None:
    """Chunks of two sequences, mixed; 4 ranks are more than most of the models have KV heads."""
    config = ModelConfig.from_pretrained(checkpoint)
    whole = [Stage(checkpoint, config, 1, 0, 1)]
    split = [Stage(checkpoint, config, tp_size, pp_rank, pp_size) for pp_rank in range(pp_size)]
    first, second = range(0, 60), range(60, 100)
    steps = [
        [
            ScheduledChunk(first[:30], 0, range(8), SAMPLING, 0),
            ScheduledChunk(second[:9], 0, range(8, 16), None, 0),
        ],
        [
            ScheduledChunk(second[9:40], 9, range(8, 16), SAMPLING, 0),
            ScheduledChunk([7], 30, range(8), SAMPLING, 1),
        ],
    ]
    for chunks in steps:
        batch = FlatBatch.of(chunks, CONFIG.block_size, CONFIG.num_blocks, config.vocab_size)
        (expected,) = run(whole, batch)
        logits = run(split, batch)
        assert expected.shape == (len(batch.wanted), config.vocab_size)
        assert len(logits) == tp_size
        for found in logits:
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def run(stages: list[Stage], batch: FlatBatch) -> list[torch.Tensor]:
    hidden: list[torch.Tensor] = []
    for stage in stages:
        hidden = stage.run(batch, hidden)
    return hidden
