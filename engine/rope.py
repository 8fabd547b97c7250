"""Rotary position embedding (Su et al. 2021): the frequencies of a model, and a step's angles."""

from __future__ import annotations

import math

import torch

from engine.config import Llama3Scaling, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """float32 [head_dim / 2]: radians by which each pair of components turns from one position to the next."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    return frequencies if rope.scaling is None else _llama3(frequencies, rope.scaling)


def rotary_angles(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32 [num_tokens, head_dim / 2], for `positions` [num_tokens]; for all layers."""
    angles = positions[:, None].float() * frequencies
    return angles.cos(), angles.sin()


def _llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Llama 3.1: slow components are slowed by `factor`, fast ones kept, and those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    slowed = torch.where(turns < scaling.low_freq_factor, frequencies / scaling.factor, between)
    return torch.where(turns > scaling.high_freq_factor, frequencies, slowed)
