"""The Kernels on CUDA: matrix products by cuBLAS through torch, everything between them by FlashInfer.

Between two matrix products torch launches up to a dozen kernels, each of which reads and writes all
activations; FlashInfer's do the same in one. They take bfloat16 and compute inside in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from engine.kernels.torch_ops import TorchKernels


class FlashInferKernels:
    """Kernels for bfloat16 on CUDA.

    flashinfer: the module. max_rows: most tokens of a step; `rotate` is slower for more.
    """

    def __init__(self, flashinfer: Any, max_rows: int, device: torch.device) -> None:
        self._flashinfer = flashinfer
        self._row_numbers = torch.arange(max_rows, dtype=torch.int32, device=device)
        self._torch = TorchKernels()
        self._cosines: torch.Tensor | None = None
        self._angles = torch.empty(0)

    def linear(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(rows, weight, bias)

    def rms_norm(self, rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if len(rows) == 0:  # no logits are wanted; a kernel cannot be launched for nothing
            return rows
        normed: torch.Tensor = self._flashinfer.rmsnorm(rows, weight, eps)
        return normed

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._flashinfer.fused_add_rmsnorm(delta, hidden, weight, eps)
        return hidden, delta

    def rotate(self, heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        num_tokens, num_heads, head_dim = heads.shape
        if num_heads == 1 or num_tokens > len(self._row_numbers):
            return self._torch.rotate(heads, cosines, sines)
        if cosines is not self._cosines:
            # Once a step: all layers are given the same tensors.
            self._cosines, self._angles = cosines, torch.cat((cosines, sines), dim=-1)
        # The kernel turns two tensors, meant to be queries and keys, by rows of a table: here the first head
        # and the others, by a table that has one row for each token of the step.
        self._flashinfer.apply_rope_with_cos_sin_cache_inplace(
            self._row_numbers[:num_tokens],
            heads[:, :1].view(num_tokens, -1),
            heads[:, 1:].view(num_tokens, -1),
            head_dim,
            self._angles,
            is_neox=True,
        )
        return heads

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        gated: torch.Tensor = self._flashinfer.silu_and_mul(gate_up)
        return gated
