"""What the machine allows: matrix products and reading of memory, measured with torch."""

from __future__ import annotations

from collections.abc import Callable

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
        """10^9 operations a second of a product of two square matrices, the best of a few."""
        return 2 * _SIZE**3 / _best(lambda: self._left @ self._right) / 1e9

    def read_gbps(self) -> float:
        """10^9 bytes a second of adding up 512 MiB, the best of a few."""
        return _READ_BYTES / _best(self._memory.sum) / 1e9


def _best(work: Callable[[], object]) -> float:
    """A limit is what the machine can do when nobody disturbs it."""
    return min(seconds_of(work) for _ in range(3))
