"""The arithmetic between and inside a model's matrices, behind one interface."""

from __future__ import annotations

from typing import Protocol

import torch


class Kernels(Protocol):
    """What a layer computes besides attention. Rows are tokens; a result may share memory with no argument
    unless it is said below."""

    def linear(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """rows @ weight.T + bias: [num_rows, inputs], [outputs, inputs], [outputs] to [num_rows, outputs]."""
        ...

    def rms_norm(self, rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Zhang and Sennrich 2019 over the last dimension of [..., width]; mean square in float32."""
        ...

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden + delta, and its rms_norm; [num_rows, width] each. Both arguments may be overwritten."""
        ...

    def rotate(self, heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        """Rotary embedding (Su et al. 2021); i pairs with i + head_dim / 2. May be done in place.

        heads: [num_tokens, num_heads, head_dim], the last dimension contiguous. cosines, sines: float32
        [num_tokens, head_dim / 2].
        """
        ...

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """SwiGLU (Shazeer 2020): silu(gate) * up, for gate and up side by side in [num_rows, 2 * width]."""
        ...
