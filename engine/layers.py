"""The formulas between a Llama layer's matrices: norm, rotary embedding, gated activation."""

from __future__ import annotations

import torch
from torch.nn.functional import silu


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Zhang and Sennrich 2019 over the last dimension; the mean square is taken in float32, as Llama does."""
    wide = hidden.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(hidden.dtype)


def rotary_angles(
    positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [num_tokens, 1, head_dim] for `positions` [num_tokens], the same in all layers."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    angles = positions[:, None].float() * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al. 2021) of [num_tokens, num_heads, head_dim]; i pairs with i + head_dim/2."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cosines + torch.cat((-second, first), dim=-1) * sines


def gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU (Shazeer 2020): [num_tokens, 2 * intermediate_size], gate then up, to half that width."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up
