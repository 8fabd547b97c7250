"""Documents to training rows: several whole documents per row, so that no document starts in its middle.

Rows come in two lengths. Short documents share short rows, where attention costs less; the long ones get rows
of the full context, which is where the late positions are trained.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

IGNORED = -100
"""The target of a padded position; the default ``ignore_index`` of PyTorch's cross entropy."""


@dataclass(frozen=True)
class Batch:
    """inputs, targets: [num_rows, row_length]; a target is the next token of its row, or ``IGNORED``."""

    inputs: Tensor
    targets: Tensor


@dataclass
class RowPacker:
    """Fills rows of one length, best fit first, and hands out full batches."""

    row_length: int
    num_rows: int
    padding_id: int
    num_open: int = 32
    open_rows: list[list[int]] = field(default_factory=list)
    full_rows: list[list[int]] = field(default_factory=list)

    def add(self, token_ids: list[int]) -> None:
        """Put a document into the open row that it fills best; close the fullest when too many are open."""
        room = self.row_length + 1 - len(token_ids)
        if room < 0:
            raise ValueError(f"a document of {len(token_ids)} tokens does not fit a row of {self.row_length}")
        fitting = [row for row in self.open_rows if len(row) <= room]
        if fitting:
            max(fitting, key=len).extend(token_ids)
            return
        self.open_rows.append(list(token_ids))
        if len(self.open_rows) > self.num_open:
            fullest = max(range(len(self.open_rows)), key=lambda index: len(self.open_rows[index]))
            self.full_rows.append(self.open_rows.pop(fullest))

    def take(self) -> Batch | None:
        """A batch, if enough rows are full."""
        if len(self.full_rows) < self.num_rows:
            return None
        rows, self.full_rows = self.full_rows[: self.num_rows], self.full_rows[self.num_rows :]
        inputs = torch.full((self.num_rows, self.row_length), self.padding_id)
        targets = torch.full((self.num_rows, self.row_length), IGNORED)
        for index, row in enumerate(rows):
            inputs[index, : len(row) - 1] = torch.tensor(row[:-1])
            targets[index, : len(row) - 1] = torch.tensor(row[1:])
        return Batch(inputs, targets)


def batches(
    documents: Iterable[list[int]], *, row_lengths: tuple[int, int], tokens_per_batch: int, padding_id: int
) -> Iterator[Batch]:
    """Batches of one row length each, in the order in which they fill up."""
    packers = [RowPacker(length, tokens_per_batch // length, padding_id) for length in row_lengths]
    for token_ids in documents:
        packer = next(packer for packer in packers if len(token_ids) <= packer.row_length + 1)
        packer.add(token_ids)
        while (batch := packer.take()) is not None:
            yield batch
