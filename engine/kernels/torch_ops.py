"""The Kernels in plain torch: they run on every device, and are what others are tested against."""

from __future__ import annotations

import torch
from torch.nn.functional import linear, silu


class TorchKernels:
    """Kernels without any code of our own below torch."""

    def linear(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(rows, weight, bias)

    def rms_norm(self, rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = rows.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * normed.to(rows.dtype)

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = hidden + delta
        return total, self.rms_norm(total, weight, eps)

    def rotate(self, heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        cosines = torch.cat((cosines, cosines), dim=-1)[:, None, :].to(heads.dtype)
        sines = torch.cat((sines, sines), dim=-1)[:, None, :].to(heads.dtype)
        first, second = heads.chunk(2, dim=-1)
        return heads * cosines + torch.cat((-second, first), dim=-1) * sines

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate) * up
