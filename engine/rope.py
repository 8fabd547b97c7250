"""Rotary position embedding (Su et al. 2021): the frequencies of a model, and a step's angles."""

from __future__ import annotations

import math

import torch

from engine.rope_config import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """float32 [head_dim / 2]: radians by which each pair of components turns at every position."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    match rope.scaling:
        case LinearScaling(factor):
            return frequencies / factor
        case Llama3Scaling():
            return _llama3(frequencies, rope.scaling)
        case YarnScaling():
            return _yarn(frequencies, rope.theta, rope.scaling)
        case None:
            return frequencies


def rotary_magnitude(rope: RopeConfig) -> float:
    """What rotated queries and keys are multiplied with: 1, but for YaRN, which sharpens attention."""
    if not isinstance(rope.scaling, YarnScaling):
        return 1.0
    if rope.scaling.attention_factor is not None:
        return rope.scaling.attention_factor
    return 0.1 * math.log(max(1.0, rope.scaling.factor)) + 1.0


def rotary_angles(
    positions: torch.Tensor, frequencies: torch.Tensor, magnitude: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, times `magnitude`: float32 [num_tokens, head_dim / 2]; positions: [num_tokens]."""
    angles = positions[:, None].float() * frequencies
    return angles.cos() * magnitude, angles.sin() * magnitude


def _llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Llama 3.1: slow components are slowed by `factor`, fast ones kept, and those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    slowed = torch.where(turns < scaling.low_freq_factor, frequencies / scaling.factor, between)
    return torch.where(turns > scaling.high_freq_factor, frequencies, slowed)


def _yarn(frequencies: torch.Tensor, theta: float, scaling: YarnScaling) -> torch.Tensor:
    """Peng et al. 2023, "NTK-by-parts": as in Llama 3.1, but interpolated over the components' numbers."""
    head_dim = 2 * len(frequencies)

    def component(turns: float) -> float:
        """Number of the component that makes so many turns over the original context."""
        wavelength = scaling.original_max_position_embeddings / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    first, last = component(scaling.beta_fast), component(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    # Bounds that fall together would divide by zero.
    ramp = (torch.arange(len(frequencies)).float() - first) / (last - first if last != first else 0.001)
    slowed = ramp.clamp(0, 1)
    return frequencies / scaling.factor * slowed + frequencies * (1 - slowed)
