"""Recorded decode steps: which recording and what padding, then whole engines that replay, on a CPU.

FlashInfer and the graphs have stand-ins here; the real ones run in test_cuda.py.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import cuda
from engine.attention import flashinfer_fake
from engine.batch import FlatBatch
from engine.config import EngineConfig, ModelConfig
from engine.cuda import CudaBackend, why_not_flashinfer
from engine.cuda_graphs import GraphExecutor, Recording, RerunRecorder, choose_size, ladder, pad, padding
from engine.device import open_device
from engine.engine import Engine
from engine.errors import DeviceError
from engine.executor import Executor
from engine.kv_cache import KvCache
from engine.loading import weights_of
from engine.model import LlamaModel
from engine.parallel.base import Solo
from engine.sequence import ScheduledChunk, TokenSampling
from engine.shard import WHOLE

CPU = torch.device("cpu")
CONFIG = EngineConfig(num_blocks=64, block_size=8, max_batch_tokens=12)
LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2}
WINDOWS = LLAMA | {
    "family": "qwen3",
    "head_dim": 16,
    "use_sliding_window": True,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
GREEDY = TokenSampling(
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    seed=0,
    max_tokens=99,
    min_tokens=0,
    stop_token_ids=frozenset(),
)


@given(st.integers(1, 1000))
def test_the_ladder_ends_at_the_largest_and_has_no_long_steps(largest: int) -> None:
    sizes = ladder(largest)
    assert sizes[-1] == largest
    assert list(sizes) == sorted(set(sizes))
    assert all(after <= 2 * size for size, after in pairwise(sizes))
    assert len(sizes) <= 18


def test_the_ladder_is_the_documented_one() -> None:
    assert ladder(256) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
    assert ladder(6) == (1, 2, 4, 6)
    assert ladder(1) == (1,)


def decode_batch(num_chunks: int, context: int = 5) -> FlatBatch:
    tables = [[7 * index, 7 * index + 1, 7 * index + 2] for index in range(num_chunks)]
    chunks = [ScheduledChunk([index + 1], context, tables[index], None, 0) for index in range(num_chunks)]
    return FlatBatch.of(chunks, 4, 1000, 100)


def test_a_decode_batch_takes_the_next_size_and_others_none() -> None:
    sizes = (1, 2, 4, 6)
    chosen = [choose_size(sizes, decode_batch(count), max_pages=3) for count in range(1, 8)]
    assert chosen == [1, 2, 4, 4, 6, 6, None]
    prefill = FlatBatch.of([ScheduledChunk([1, 2], 0, [0], None, 0)], 4, 1, 100)
    assert choose_size(sizes, prefill, max_pages=3) is None
    assert choose_size(sizes, decode_batch(2, context=8), max_pages=2) is None


@given(st.integers(1, 9), st.integers(0, 9))
def test_padding_adds_sequences_of_one_token_in_the_spare_block(num_chunks: int, more: int) -> None:
    batch = decode_batch(num_chunks)
    padded = pad(batch, num_chunks + more, spare_block=999)
    assert padded.is_decode
    assert padded.num_chunks == num_chunks + more
    for name in ("token_ids", "positions", "context_lens", "block_tables"):
        before, after = getattr(batch, name), getattr(padded, name)
        assert np.array_equal(after[:num_chunks], before)
        assert after.dtype == before.dtype
    assert padded.query_starts.tolist() == list(range(num_chunks + more + 1))
    assert padded.wanted is batch.wanted
    blocks, offsets = padded.places(4)
    assert set(zip(blocks[num_chunks:].tolist(), offsets[num_chunks:].tolist(), strict=True)) <= {(999, 0)}
    assert padded.context_lens[num_chunks:].tolist() == [1] * more


def test_a_batch_of_padding_alone() -> None:
    batch = padding(3, spare_block=5)
    assert batch.is_decode
    assert batch.block_tables.tolist() == [[5], [5], [5]]
    assert batch.context_lens.tolist() == [1, 1, 1]


class CountingRecorder(RerunRecorder):
    """Counts replays, by the size of their batch, and remembers in which order they were recorded."""

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.replayed: list[int] = []

    def record(self, compute: Callable[[], torch.Tensor]) -> Recording:
        recording = super().record(compute)
        size = recording.output.shape[0]
        self.recorded.append(size)

        def replay() -> None:
            self.replayed.append(size)
            recording.replay()

        return Recording(replay, recording.output)


def backend_of(checkpoint: Path, recorder: RerunRecorder | None) -> tuple[Executor, KvCache]:
    """What an engine on CUDA has, with stand-ins, on the CPU."""
    model_config = ModelConfig.from_pretrained(checkpoint)
    backend = CudaBackend(model_config, CONFIG, CPU, flashinfer_fake, recorder)
    weights = weights_of(checkpoint, model_config, CONFIG, lambda fraction: None)
    model = LlamaModel(model_config, WHOLE, weights, backend.kernels(), Solo())
    cache = backend.cache(CONFIG.num_blocks)
    return backend.executor(model, cache), cache


def random_steps(seed: int) -> list[list[ScheduledChunk]]:
    """Twelve sequences, each prefilled in one or two chunks and then decoded, in batches of changing size."""
    dice = random.Random(seed)
    blocks = dice.sample(range(64), 64)
    lengths = [0] * 12
    steps = []
    for _ in range(30):
        budget = CONFIG.max_batch_tokens
        step = []
        for index in dice.sample(range(12), dice.randint(1, 12)):
            length = dice.randint(1, 6) if lengths[index] < 4 else 1
            if length > budget or lengths[index] + length > 40:
                continue
            budget -= length
            tokens = [dice.randrange(160) for _ in range(length)]
            step.append(ScheduledChunk(tokens, lengths[index], blocks[index * 5 : index * 5 + 5], GREEDY, 0))
            lengths[index] += length
        if step:
            steps.append(step)
    return steps


@pytest.mark.parametrize("shape", [LLAMA, WINDOWS], ids=["llama", "windows"])
def test_replayed_steps_are_the_eager_ones_and_touch_no_other_block(
    new_checkpoint: Callable[..., Path], load_engine: Callable[..., Engine], shape: dict[str, Any]
) -> None:
    checkpoint = new_checkpoint(**shape)
    recorder = CountingRecorder()
    graphs, graph_cache = backend_of(checkpoint, recorder)
    eager, eager_cache = backend_of(checkpoint, None)
    plain = load_engine(checkpoint, max_batch_tokens=CONFIG.max_batch_tokens)
    assert isinstance(graphs, GraphExecutor)
    assert recorder.recorded == [12, 8, 4, 2, 1]
    assert not graph_cache.data[: CONFIG.num_blocks].any()
    vocab_size = plain.model_config.vocab_size
    replays = 0
    for step in random_steps(0):
        batch = FlatBatch.of(step, CONFIG.block_size, CONFIG.num_blocks, vocab_size)
        logits = graphs.logits(batch)
        torch.testing.assert_close(logits, eager.logits(batch), atol=1e-4, rtol=1e-4)
        tokens = [result.token_id for result in plain.runner.step(step)]
        assert logits.argmax(dim=-1).tolist() == tokens
        replays += batch.is_decode
        real = slice(0, CONFIG.num_blocks)
        torch.testing.assert_close(graph_cache.data[real], eager_cache.data[real], atol=1e-4, rtol=1e-4)
    assert len(recorder.replayed) == replays > 5
    assert len(set(recorder.replayed)) > 2


def test_only_rows_that_are_wanted_have_logits(random_checkpoint: Path) -> None:
    graphs, _ = backend_of(random_checkpoint, CountingRecorder())
    chunks = [ScheduledChunk([index], 0, [index], GREEDY, 0) for index in range(5)]
    every = graphs.logits(FlatBatch.of(chunks, 8, 64, 160)).clone()
    chunks[1] = replace(chunks[1], sampling=None)
    some = graphs.logits(FlatBatch.of(chunks, 8, 64, 160))
    torch.testing.assert_close(some, every[[0, 2, 3, 4]], atol=1e-5, rtol=1e-5)
    # Chunks of a prompt before its last want none.
    for length in (1, 3):
        chunk = ScheduledChunk([1] * length, 0, [0], None, 0)
        assert graphs.logits(FlatBatch.of([chunk], 8, 64, 160)).shape == (0, 160)


def test_without_flashinfer_a_warning_says_so_and_torch_computes(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda, "import_flashinfer", lambda: None)
    model_config = ModelConfig.from_pretrained(random_checkpoint)
    with caplog.at_level(logging.WARNING):
        backend = CudaBackend.of(model_config, CONFIG, CPU)
    assert (backend.flashinfer, backend.recorder) == (None, None)
    assert "flashinfer-python is missing" in caplog.text
    weights = weights_of(random_checkpoint, model_config, CONFIG, lambda fraction: None)
    model = LlamaModel(model_config, WHOLE, weights, backend.kernels(), Solo())
    executor = backend.executor(model, backend.cache(CONFIG.num_blocks))
    expected, _ = backend_of(random_checkpoint, None)
    for step in random_steps(1)[:5]:
        batch = FlatBatch.of(step, CONFIG.block_size, CONFIG.num_blocks, model_config.vocab_size)
        torch.testing.assert_close(executor.logits(batch), expected.logits(batch), atol=1e-4, rtol=1e-4)


def test_what_flashinfer_cannot_compute_is_named(random_checkpoint: Path) -> None:
    model = replace(ModelConfig.from_pretrained(random_checkpoint), head_dim=128)
    config = replace(CONFIG, dtype="bfloat16")
    assert why_not_flashinfer(flashinfer_fake, model, config) is None
    assert "dtype is float32" in str(why_not_flashinfer(flashinfer_fake, model, CONFIG))
    assert "head_dim is 80" in str(why_not_flashinfer(flashinfer_fake, replace(model, head_dim=80), config))


def test_a_device_that_is_not_there_is_refused(
    random_checkpoint: Path, load_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_device("cpu") == CPU
    with pytest.raises(DeviceError, match="'cpu' or 'cuda'"):
        open_device("tpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError, match="built without CUDA"):
        load_engine(random_checkpoint, device="cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no GPU that it can use"):
        load_engine(random_checkpoint, device="cuda")


def test_a_cache_on_a_device_takes_no_buffer(random_checkpoint: Path) -> None:
    _, cache = backend_of(random_checkpoint, None)
    assert cache.blocks.shape[0] == cache.num_blocks == cache.data.shape[0] - 1
    with pytest.raises(ValueError, match="cannot lie in a given buffer"):
        KvCache(cache.layout, 1, memoryview(bytearray(cache.layout.block_nbytes)), torch.device("meta"))
