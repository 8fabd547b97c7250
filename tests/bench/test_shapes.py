"""The configs of bench/shapes are those of the public models, by what makes up their size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import ModelConfig
from engine.shard import WHOLE
from engine.weights import allocate_weights, weight_parts

SHAPES = Path(__file__).parents[2] / "bench" / "shapes"


@pytest.mark.parametrize(
    ("name", "num_parameters", "kv_numbers_per_token"),
    [
        ("smollm2-135m", 134_515_008, 30 * 2 * 3 * 64),
        ("qwen2.5-0.5b", 494_032_768, 24 * 2 * 2 * 64),
        ("llama-3.1-8b", 8_030_261_248, 32 * 2 * 8 * 128),
        ("llama2-70b", 68_976_648_192, 80 * 2 * 8 * 128),
        ("qwen3-8b", 8_190_735_360, 36 * 2 * 8 * 128),
    ],
)
def test_shapes_have_the_size_of_the_models(
    name: str, num_parameters: int, kv_numbers_per_token: int
) -> None:
    config = ModelConfig.from_pretrained(SHAPES / name)
    parts = weight_parts(allocate_weights(config, torch.bfloat16, WHOLE, "meta"), config, WHOLE)
    assert sum(part.target.numel() for part in parts.values()) == num_parameters
    assert config.num_layers * 2 * config.num_kv_heads * config.head_dim == kv_numbers_per_token


def test_every_shape_is_in_the_table() -> None:
    names = sorted(path.parent.name for path in SHAPES.glob("*/config.json"))
    table = (SHAPES / "README.md").read_text()
    assert names == sorted(row.split("`")[1] for row in table.splitlines() if row.startswith("| `"))
