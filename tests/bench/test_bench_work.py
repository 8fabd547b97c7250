"""The work that a step cannot avoid, against numbers worked out by hand and against published ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.work import decode_work, layer_parameters, prefill_work
from engine.config import ModelConfig

SHAPES = Path(__file__).parents[2] / "bench" / "shapes"


@pytest.fixture(scope="module")
def smollm() -> ModelConfig:
    return ModelConfig.from_pretrained(SHAPES / "smollm2-135m")


def test_parameters_of_the_layers(smollm: ModelConfig) -> None:
    # q and out 576 x 576, k and v 192 x 576, gate, up and down 1536 x 576.
    assert layer_parameters(smollm) == 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)


def test_decode_reads_weights_once_and_each_sequences_kv(smollm: ModelConfig) -> None:
    weights = layer_parameters(smollm) + 49152 * 576
    kv_of_a_token = 30 * 2 * 3 * 64
    work = decode_work(smollm, 8, 512, "bfloat16")
    assert work.num_bytes == 2 * (weights + 8 * 512 * kv_of_a_token)
    assert work.num_flops == 2 * 8 * weights + 8 * 512 * 30 * 9 * 64 * 4
    assert decode_work(smollm, 8, 512, "float32").num_bytes == 2 * work.num_bytes


def test_prefill_computes_the_head_for_one_row_and_half_of_the_square(smollm: ModelConfig) -> None:
    one, two = prefill_work(smollm, 1, "bfloat16"), prefill_work(smollm, 2, "bfloat16")
    a_pair = 30 * 9 * 64 * 4
    assert one.num_flops == 2 * (layer_parameters(smollm) + 49152 * 576) + a_pair
    assert two.num_flops - one.num_flops == 2 * layer_parameters(smollm) + 2 * a_pair
    assert one.num_bytes == two.num_bytes


@pytest.mark.parametrize(("tokens", "tok_s"), [(128, 1010), (512, 960), (2048, 780)])
def test_prefill_limits_of_a_core_with_220_gflops(smollm: ModelConfig, tokens: int, tok_s: float) -> None:
    assert tokens / prefill_work(smollm, tokens, "bfloat16").shortest_s(220, 31) == pytest.approx(
        tok_s, rel=0.05
    )


@pytest.mark.parametrize(("batch", "tok_s"), [(1, 110), (8, 680), (32, 725)])
def test_decode_limits_of_a_core_that_reads_31_gbps(smollm: ModelConfig, batch: int, tok_s: float) -> None:
    work = decode_work(smollm, batch, 512, "bfloat16")
    assert batch / work.shortest_s(220, 31) == pytest.approx(tok_s, rel=0.05)
