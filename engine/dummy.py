"""Random weights from a config alone, for measurements.

A model's speed does not depend on what it has learnt, as long as its activations stay in scale.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import torch

from engine.config import ModelConfig
from engine.shard import WHOLE, Shard
from engine.weights import ModelWeights, Part, allocate_weights, weight_parts

_BLOCK_NUMEL = 2**18
"""Numbers that are drawn at a time, before a rank keeps its part of them."""


def dummy_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    seed: int,
    shard: Shard = WHOLE,
    device: str | torch.device = "cpu",
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> ModelWeights:
    """A rank's part of weights that depend on `seed` and the tensors' names, not on how the model is split.

    Matrices are uniform with a variance of 1 / inputs, which keeps activations in scale; norms lie around 1,
    biases around 0. Raises UnsupportedModelError for models that cannot be split so.
    """
    shard.check(config)
    weights = allocate_weights(config, dtype, shard, device)
    parts = weight_parts(weights, config, shard)
    num_drawn = 0
    num_total = sum(part.target.numel() for part in parts.values())
    for name, part in parts.items():
        _draw(name, part, seed)
        num_drawn += part.target.numel()
        on_progress(num_drawn / num_total)
    return weights


def dummy_fingerprint(path: Path, seed: int) -> str:
    """Identity of the model that `dummy_weights` makes from `path`/config.json."""
    return hashlib.sha256((path / "config.json").read_bytes() + f"\ndummy {seed}\n".encode()).hexdigest()


def _draw(name: str, part: Part, seed: int) -> None:
    """Fill a part block by block of whole rows, each block with a seed of its own."""
    low, high = _bounds(name, part.shape)
    kept = part.kept[0]
    columns = tuple(slice(run.start, run.stop) for run in part.kept[1:])
    block_rows = max(1, _BLOCK_NUMEL // math.prod(part.shape[1:]))
    generator = torch.Generator()
    for block in range(kept.start // block_rows, math.ceil(kept.stop / block_rows)):
        first = block * block_rows
        stop = min(first + block_rows, part.shape[0])
        digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        values = torch.empty(stop - first, *part.shape[1:]).uniform_(low, high, generator=generator)
        rows = range(max(first, kept.start), min(stop, kept.stop))
        part.target[rows.start - kept.start : rows.stop - kept.start].copy_(
            values[(slice(rows.start - first, rows.stop - first), *columns)]
        )


def _bounds(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if name.endswith("norm.weight"):
        return 0.9, 1.1
    if name.endswith(".bias"):
        return -0.1, 0.1
    limit = math.sqrt(3 / shape[-1])
    return -limit, limit
