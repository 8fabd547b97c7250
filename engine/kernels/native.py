"""The Kernels compiled for AVX-512: products of few rows at the speed of memory, and nothing in between that
reads the activations twice.

Products of many rows of bfloat16 stay with torch, whose oneDNN comes within a few percent of what the CPU can
do; in float32 torch is the slower one at every size. A row's result does not depend on how many rows there
are, as long as torch does not compute it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.nn.functional import linear

from engine.native.library import load_library

_MAX_ROWS: Mapping[str, float] = {"bfloat16": 128, "float32": math.inf}
"""With more rows than this torch's product is the faster one: `python -m bench.kernels`."""


class NativeKernels:
    """Kernels for one number type, "bfloat16" or "float32". Raises KernelsUnavailableError."""

    def __init__(self, dtype: str, threads: int) -> None:
        library = load_library()
        self._linear = getattr(library, f"linear_{dtype}")
        self._rms_norm = getattr(library, f"rms_norm_{dtype}")
        self._add_rms_norm = getattr(library, f"add_rms_norm_{dtype}")
        self._rotate = getattr(library, f"rotate_{dtype}")
        self._gated_silu = getattr(library, f"gated_silu_{dtype}")
        self._max_rows = _MAX_ROWS[dtype]
        self._threads = threads

    def linear(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        num_rows, num_outputs = rows.shape[0], weight.shape[0]
        if num_rows > self._max_rows:
            return linear(rows, weight, bias)
        rows = rows.contiguous()
        outputs = rows.new_empty((num_rows, num_outputs))
        self._linear(
            rows.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            outputs.data_ptr(),
            num_rows,
            num_outputs,
            rows.shape[1],
            self._threads,
        )
        return outputs

    def rms_norm(self, rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows = rows.contiguous()
        normed = torch.empty_like(rows)
        width = weight.shape[0]
        num_rows = rows.numel() // width
        self._rms_norm(
            rows.data_ptr(), weight.data_ptr(), normed.data_ptr(), num_rows, width, eps, self._threads
        )
        return normed

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # In place: row by row the sum goes to `hidden` and then, normed, to `delta`.
        self._add_rms_norm(
            hidden.data_ptr(),
            delta.data_ptr(),
            weight.data_ptr(),
            delta.data_ptr(),
            *hidden.shape,
            eps,
            self._threads,
        )
        return hidden, delta

    def rotate(self, heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        num_tokens, num_heads, head_dim = heads.shape
        self._rotate(
            heads.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            num_tokens,
            heads.stride(0),
            num_heads,
            head_dim,
            self._threads,
        )
        return heads

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        gated = gate_up.new_empty((num_rows, width))
        self._gated_silu(gate_up.data_ptr(), gated.data_ptr(), num_rows, width, self._threads)
        return gated
