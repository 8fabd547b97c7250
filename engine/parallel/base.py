"""The tensor-parallel group that a model is given: what its ranks do together."""

from __future__ import annotations

from typing import Protocol

import torch


class TensorGroup(Protocol):
    """The ranks that hold the same layers. Every rank calls every method, in the same order."""

    @property
    def size(self) -> int: ...

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, on every rank; `partial` may be overwritten."""
        ...

    def concat(self, columns: torch.Tensor) -> torch.Tensor:
        """[num_rows, width] of every rank side by side, in order of rank, on every rank; equal widths."""
        ...


class Solo:
    """The group of one rank."""

    size = 1

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        return partial

    def concat(self, columns: torch.Tensor) -> torch.Tensor:
        return columns
