"""A rank's weights and a model's identity, whether the weights are the checkpoint's or made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from engine.checkpoint import fingerprint
from engine.config import EngineConfig, ModelConfig
from engine.dummy import dummy_fingerprint, dummy_weights
from engine.shard import WHOLE, Shard
from engine.weights import ModelWeights, load_weights

_DUMMY_SEED = 0
"""One for all, so that the workers of a deployment have the same model."""


def weights_of(
    checkpoint: Path,
    model: ModelConfig,
    engine: EngineConfig,
    on_progress: Callable[[float], None],
    shard: Shard = WHOLE,
) -> ModelWeights:
    """The part that `shard` says of the weights that `engine` says; see load_weights and dummy_weights."""
    dtype = getattr(torch, engine.dtype)
    if engine.load == "dummy":
        return dummy_weights(model, dtype, _DUMMY_SEED, shard, engine.device, on_progress)
    return load_weights(checkpoint, model, dtype, on_progress, shard, engine.device)


def fingerprint_of(checkpoint: Path, engine: EngineConfig) -> str:
    """Identity of the model that an engine with this config loads; equal for every split of it."""
    if engine.load == "dummy":
        return dummy_fingerprint(checkpoint, _DUMMY_SEED)
    return fingerprint(checkpoint)
