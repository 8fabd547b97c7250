"""Where a token's keys and values lie: inside a KV block, and in which block. No torch here.

One block is ONE contiguous run of bytes, [num_layers, 2 (keys, values), block_size, num_kv_heads, head_dim],
so that a transfer of a block is a single copy, whatever the number of layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.config import DTYPE_NBYTES, EngineConfig, ModelConfig
from engine.errors import InvalidStepError
from engine.sequence import ScheduledChunk
from engine.shard import WHOLE, Shard


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The shape of one KV block; two workers can exchange blocks if their layouts are equal.

    block_size: tokens in a block. dtype: "float32" or "bfloat16".
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str

    @classmethod
    def of(cls, model: ModelConfig, engine: EngineConfig, shard: Shard = WHOLE) -> KvLayout:
        """What one rank of a worker caches: the layers of its stage, the KV heads of its shard."""
        return cls(
            len(shard.layers(model)),
            len(shard.kv_heads(model)),
            model.head_dim,
            engine.block_size,
            engine.dtype,
        )

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def block_nbytes(self) -> int:
        return math.prod(self.block_shape) * DTYPE_NBYTES[self.dtype]


def locate_context(
    chunk: ScheduledChunk, block_size: int, num_blocks: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Block and offset in it of every position of a chunk's sequence, from 0 to the chunk's last token.

    Raises InvalidStepError for a chunk without tokens, one that its block table does not cover, and blocks
    that do not exist.
    """
    num_tokens = len(chunk.token_ids)
    table = np.asarray(chunk.block_table, dtype=np.int64)
    if num_tokens == 0 or chunk.start < 0 or chunk.start + num_tokens > len(table) * block_size:
        raise InvalidStepError(
            f"a chunk of {num_tokens} tokens from position {chunk.start} with {len(table)} blocks of "
            f"{block_size} tokens: it must have a token, and its block table must cover it"
        )
    if table.min() < 0 or table.max() >= num_blocks:
        raise InvalidStepError(
            f"block table {table.tolist()}: there are only the blocks 0 to {num_blocks - 1}"
        )
    positions = np.arange(chunk.start + num_tokens)
    return table[positions // block_size], positions % block_size
