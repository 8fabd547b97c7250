"""The memory of keys and values: blocks for those who move them, slots for those who compute on them.

A slot is where one token's keys of layer 0 lie, counted in rows of [num_kv_heads, head_dim] over the whole
memory. Its values and its other layers lie at fixed distances from there, so that a step works out its slots
once for all layers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from engine.layout import KvLayout
from engine.staging import to_device

_CPU = torch.device("cpu")


class KvCache:
    """`num_blocks` blocks of `layout`, over `buffer` or, without one, over memory of its own on `device`.

    buffer: num_blocks * block_nbytes writable bytes, for example shared memory; used in place, never copied.
    num_spare: blocks behind those, which no sequence has and nobody moves: for rows that fill up a batch.
    data: [num_blocks + num_spare, num_layers, 2 (keys, values), block_size, num_kv_heads, head_dim].
    blocks: uint8 [num_blocks, block_nbytes], the same memory for those who only move it.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        buffer: memoryview | None = None,
        device: torch.device = _CPU,
        num_spare: int = 0,
    ) -> None:
        size = (num_blocks + num_spare) * layout.block_nbytes
        if buffer is None:
            memory = torch.zeros(size, dtype=torch.uint8, device=device)
        elif device.type != "cpu":
            raise ValueError(f"a KV cache on {device} has memory of its own; it cannot lie in a given buffer")
        elif buffer.readonly or buffer.nbytes != size:
            raise ValueError(
                f"a KV cache of {num_blocks} blocks needs {size} writable bytes, "
                f"not {buffer.nbytes} {'read-only' if buffer.readonly else 'writable'} ones"
            )
        else:
            memory = torch.frombuffer(buffer, dtype=torch.uint8)
        self.layout = layout
        self.num_blocks = num_blocks
        self.blocks = memory.view(-1, layout.block_nbytes)[:num_blocks]
        self.data = memory.view(getattr(torch, layout.dtype)).view(-1, *layout.block_shape)
        self._rows = self.data.view(-1, layout.num_kv_heads, layout.head_dim)

    def slots(self, blocks: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]) -> torch.Tensor:
        """The slots of tokens, given the block of each and its offset there (arrays of one shape)."""
        slots = blocks * (self.layout.num_layers * 2 * self.layout.block_size) + offsets
        return to_device(self.data.device, slots)[0]

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values [num_tokens, num_kv_heads, head_dim] of one layer at `slots` [num_tokens]."""
        rows = slots + layer * 2 * self.layout.block_size
        self._rows.index_copy_(0, rows, keys)
        self._rows.index_copy_(0, rows + self.layout.block_size, values)

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys and values [*slots.shape, num_kv_heads, head_dim] of one layer at `slots`."""
        rows = slots.flatten() + layer * 2 * self.layout.block_size
        shape = (*slots.shape, self.layout.num_kv_heads, self.layout.head_dim)
        keys = self._rows.index_select(0, rows).view(shape)
        values = self._rows.index_select(0, rows + self.layout.block_size).view(shape)
        return keys, values
