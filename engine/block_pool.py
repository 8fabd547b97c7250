"""Who holds which KV block: it is free, owned by a sequence, or leased to a transfer. A core, without torch.

A block carries references of two kinds. A SEQUENCE reference belongs to a request that computes on the block,
a TRANSFER reference to a hand-off that reads or fills it. Only a block without any reference is free, so a
request that ends while a transfer still reads its blocks gives nothing away.

Each block has a generation, bumped at the moment the block becomes free. A reader that notes the generation
before it copies and finds another one afterwards knows that its copy may be somebody else's data.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from engine.errors import BlockAccountingError, OutOfBlocksError

_GENERATIONS = 2**32


class Holder(Enum):
    """What a reference to a block is held for."""

    SEQUENCE = "sequence"
    TRANSFER = "transfer"


class Generations(Protocol):
    """One counter a block: a list of int, or a numpy uint32 view of memory that other processes read."""

    def __len__(self) -> int: ...

    def __getitem__(self, block: int, /) -> int: ...

    def __setitem__(self, block: int, generation: int, /) -> None: ...


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """A census of the pool. free + owned + leased is the number of blocks.

    leased: blocks with any TRANSFER reference. owned: blocks with SEQUENCE references only.
    """

    free: int
    owned: int
    leased: int


class BlockPool:
    """Reference counts over `num_blocks` blocks of `block_size` tokens each.

    generations: [num_blocks], counts modulo 2**32 how often each block became free; only this pool writes it.
    Every method either does all that it was asked for or raises and changes nothing.
    """

    def __init__(self, num_blocks: int, block_size: int, generations: Generations) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool of {num_blocks} blocks of {block_size} tokens: both must be at least 1")
        if len(generations) != num_blocks:
            raise ValueError(f"{len(generations)} generations for {num_blocks} blocks: give one for each")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._generations = generations
        # First freed, first reused: a block rests for as long as possible before it is written again.
        self._free = deque(range(num_blocks))
        self._references = {holder: [0] * num_blocks for holder in Holder}
        self._num_leased = 0

    def num_blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= len(self._free)

    def allocate(self, num_blocks: int, holder: Holder) -> list[int]:
        """Take free blocks, each with one reference of `holder`. Raises OutOfBlocksError."""
        if num_blocks < 0:
            raise ValueError(f"cannot allocate {num_blocks} blocks")
        if not self.can_allocate(num_blocks):
            raise OutOfBlocksError(
                f"{num_blocks} KV blocks wanted, {len(self._free)} of {self.num_blocks} are free"
            )
        blocks = [self._free.popleft() for _ in range(num_blocks)]
        references = self._references[holder]
        for block in blocks:
            references[block] = 1
        if holder is Holder.TRANSFER:
            self._num_leased += num_blocks
        return blocks

    def add(self, blocks: Sequence[int], holder: Holder) -> None:
        """One more reference of `holder` for each of `blocks`, which somebody must hold already.

        Raises BlockAccountingError if one of them is free: what it held may be overwritten at any moment.
        """
        for block in blocks:
            self._check_exists(block)
            if not self._is_held(block):
                raise BlockAccountingError(
                    f"block {block} is free: it cannot be shared with a {holder.value}"
                )
        references = self._references[holder]
        for block in blocks:
            if holder is Holder.TRANSFER and references[block] == 0:
                self._num_leased += 1
            references[block] += 1

    def drop(self, blocks: Sequence[int], holder: Holder) -> None:
        """Give back one reference of `holder` for each of `blocks`; a block without any reference is free.

        Raises BlockAccountingError if `holder` has fewer references than it drops.
        """
        references = self._references[holder]
        for block, dropped in Counter(blocks).items():
            self._check_exists(block)
            if references[block] < dropped:
                raise BlockAccountingError(
                    f"block {block} has {references[block]} {holder.value} references, {dropped} were dropped"
                )
        for block in blocks:
            references[block] -= 1
            if holder is Holder.TRANSFER and references[block] == 0:
                self._num_leased -= 1
            if not self._is_held(block):
                self._generations[block] = (int(self._generations[block]) + 1) % _GENERATIONS
                self._free.append(block)

    def counts(self) -> BlockCounts:
        num_free = len(self._free)
        return BlockCounts(num_free, self.num_blocks - num_free - self._num_leased, self._num_leased)

    def check(self) -> None:
        """Recount everything from the references; raises BlockAccountingError if the books do not agree."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise BlockAccountingError("a block is on the free list twice")
        unreferenced = {block for block in range(self.num_blocks) if not self._is_held(block)}
        if free != unreferenced:
            raise BlockAccountingError(
                f"free but referenced, or unreferenced but not free: blocks {sorted(free ^ unreferenced)}"
            )
        num_leased = sum(count > 0 for count in self._references[Holder.TRANSFER])
        if num_leased != self._num_leased:
            raise BlockAccountingError(f"{num_leased} blocks are leased, the books say {self._num_leased}")

    def _is_held(self, block: int) -> bool:
        return any(references[block] for references in self._references.values())

    def _check_exists(self, block: int) -> None:
        if not 0 <= block < self.num_blocks:
            raise BlockAccountingError(f"there is no block {block}: the pool has {self.num_blocks}")
