"""What the machine allows: matrix products and reading of memory, measured with torch."""

from __future__ import annotations

import torch

from bench.timing import seconds_of

_SIZE = 2048
_READ_BYTES = 512 * 2**20


class Limits:
    """Holds the operands, so that a measurement allocates nothing."""

    def __init__(self, dtype: str) -> None:
        self._left, self._right = torch.randn(2, _SIZE, _SIZE).to(getattr(torch, dtype))
        # Every page written: untouched ones are all the same page of zeros, which caches hold.
        self._memory = torch.ones(_READ_BYTES // 4, dtype=torch.float32)

    def gemm_gflops(self) -> float:
        """10^9 operations a second of a product of two square matrices, one call."""
        return 2 * _SIZE**3 / seconds_of(lambda: self._left @ self._right) / 1e9

    def read_gbps(self) -> float:
        """10^9 bytes a second of adding up 512 MiB, one call."""
        return _READ_BYTES / seconds_of(self._memory.sum) / 1e9
