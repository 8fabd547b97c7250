"""What bench.cuda counts and times, on a CPU with stand-ins; its figures need a GPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from bench import cuda
from engine.attention import flashinfer_fake
from engine.config import EngineConfig, ModelConfig
from engine.cuda import CudaBackend
from engine.cuda_graphs import RerunRecorder
from engine.layout import KvLayout
from engine.model import LlamaModel
from engine.model_runner import ModelRunner
from engine.parallel.base import Solo
from engine.rope_config import RopeConfig
from engine.shard import WHOLE

CPU = torch.device("cpu")
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=24,
    vocab_size=30,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope=RopeConfig(10000.0),
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_ids=(),
    qkv_bias=True,
    attention_out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    windows=(None, None),
)


def small_bench(model: ModelConfig) -> cuda.Bench:
    config = EngineConfig(num_blocks=8, block_size=4, max_batch_tokens=16)
    backend = CudaBackend(model, config, CPU, flashinfer_fake, RerunRecorder())
    weights = cuda.random_weights(model, torch.float32, CPU)
    llama = LlamaModel(model, WHOLE, weights, backend.kernels(), Solo())
    cache = backend.cache(config.num_blocks)
    runners = [
        ModelRunner(each.executor(llama, cache), 4, config.num_blocks, model.vocab_size)
        for each in (backend, replace(backend, recorder=None))
    ]
    layout = KvLayout.of(model, config)
    return cuda.Bench(model, layout, 4, 8, cuda.weights_nbytes(weights), *runners)


def test_every_weight_is_counted_once_but_not_the_embedding() -> None:
    qkv, attention_out, mlp = 16 * (4 + 2 + 2) * 8, 16 * 32, 3 * 16 * 24
    layer = qkv + (4 + 2 + 2) * 8 + attention_out + mlp + 2 * 16
    without_embedding = 2 * layer + 16 + 30 * 16
    for tied in (False, True):
        model = replace(MODEL, tie_word_embeddings=tied)
        weights = cuda.random_weights(model, torch.float32, CPU)
        assert cuda.weights_nbytes(weights) == 4 * without_embedding


def test_work_of_prefill_and_decode() -> None:
    linear = 16 * (4 + 2 + 2) * 8 + 16 * 32 + 3 * 16 * 24
    # Tokens 0, 1, 2 see 1, 2, 3 tokens; each pair costs two products of 8 numbers in each of 4 heads.
    attention = (1 + 2 + 3) * 2 * 8 * 4
    assert cuda.prefill_flop(MODEL, 3) == 2 * (2 * (3 * linear + attention) + 16 * 30)
    bench = small_bench(MODEL)
    per_token = 2 * 2 * 2 * 8 * 4
    assert cuda.decode_nbytes(bench, batch=3, context=5) == bench.weights_nbytes + 3 * 5 * per_token


def test_rows_have_rates_and_shares_of_the_limits(capsys: pytest.CaptureFixture[str]) -> None:
    limits = cuda.Limits(copy_gbps=2e-6, read_gbps=1e-6, gemm_tflops=1e-9)
    ticks = count()
    bench = small_bench(MODEL)
    # Every step takes one second by this clock.
    rows = list(cuda.measure(bench, limits, [3, 16], [1, 3, 9], 5, 2, lambda: float(next(ticks))))
    assert [(phase, row.get("tokens"), row.get("batch")) for phase, row in rows] == [
        ("prefill", 3, None),
        ("prefill", 16, None),
        ("decode", None, 1),
        ("decode", None, 3),
    ]
    assert "batch 9 at context 5 left out" in capsys.readouterr().err
    prefill, decode = rows[0][1], rows[3][1]
    assert prefill["tok_s"] == decode["tok_s"] == decode["eager_tok_s"] == 3
    assert prefill["share_of_limit"] == pytest.approx(cuda.prefill_flop(MODEL, 3) / 1e12 / 1e-9)
    assert decode["share_of_limit"] == pytest.approx(cuda.decode_nbytes(bench, 3, 5) / 1e9 / 2e-6)


def test_limits_are_measured_on_any_device() -> None:
    limits = cuda.measure_limits(CPU, lambda: None, nbytes=2**16, width=32)
    assert min(limits.copy_gbps, limits.read_gbps, limits.gemm_tflops) > 0
    assert limits.memory_gbps == max(limits.copy_gbps, limits.read_gbps)


def test_without_a_gpu_it_refuses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.main(["--json", str(tmp_path / "out.json")]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
