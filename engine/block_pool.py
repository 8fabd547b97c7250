"""Who holds which KV block: sequences, transfers, the prefix cache, or nobody. A core, without torch.

A block carries references of three kinds. A SEQUENCE reference belongs to a request that computes on the
block, a TRANSFER reference to a hand-off that reads or fills it, a CACHE reference to the prefix cache, which
knows what the block holds. A request that ends while a transfer still reads its blocks gives nothing away.

A block without any reference is free. One that only the cache holds is as good as free: an allocation takes
free blocks first, and then such blocks, the one that has gone unused for longest first. What one call of
`drop` leaves to the cache counts as unused from its end to its beginning: of a sequence the last block goes
first, so that what is left is always the beginning of a prefix.

Each block has a generation, bumped at the moment that what it holds is given up: when it becomes free, or
when it is taken from the cache. A reader that notes the generation before it copies and finds another one
afterwards knows that its copy may be somebody else's data.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, SupportsInt

from engine.errors import BlockAccountingError, OutOfBlocksError

_GENERATIONS = 2**32


class Holder(StrEnum):
    """What a reference to a block is held for."""

    SEQUENCE = "sequence"
    CACHE = "cache"
    TRANSFER = "transfer"


class Generations(Protocol):
    """One counter a block: a list of int, or a numpy uint32 view of memory that other processes read."""

    def __len__(self) -> int: ...

    def __getitem__(self, block: int, /) -> SupportsInt: ...

    def __setitem__(self, block: int, generation: int, /) -> None: ...


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """A census of the pool. free + owned + leased + cached is the number of blocks.

    leased: blocks with any TRANSFER reference. owned: other blocks with any SEQUENCE reference. cached:
    blocks that only the prefix cache holds.
    """

    free: int
    owned: int
    leased: int
    cached: int

    @property
    def available(self) -> int:
        """Blocks that an allocation can have: free and cached ones."""
        return self.free + self.cached


class BlockPool:
    """Reference counts over `num_blocks` blocks of `block_size` tokens each.

    generations: [num_blocks], counts modulo 2**32 how often what each block held was given up; only this pool
    writes it. Every method either does all that it was asked for or raises and changes nothing.
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
        # Held by the cache only, the longest unused first.
        self._unused: OrderedDict[int, None] = OrderedDict()
        self._references = {holder: [0] * num_blocks for holder in Holder}
        # Of all holders together; a pool is asked for each block of each request several times.
        self._total = [0] * num_blocks
        self._cache = self._references[Holder.CACHE]
        self._num_references = dict.fromkeys(Holder, 0)
        self._num_leased = 0
        self._forget: Callable[[int], None] = lambda block: None

    def tell(self, forget: Callable[[int], None]) -> None:
        """From now on `forget` is called with each block that is taken from the cache."""
        self._forget = forget

    def num_blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def num_references(self, holder: Holder) -> int:
        """References of `holder` to all blocks together."""
        return self._num_references[holder]

    @property
    def num_available(self) -> int:
        """Blocks that an allocation can have: free and cached ones."""
        return len(self._free) + len(self._unused)

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= self.num_available

    def allocate(self, num_blocks: int, holder: Holder) -> list[int]:
        """Take free or cached blocks, each with one reference of `holder`. Raises OutOfBlocksError."""
        if num_blocks < 0:
            raise ValueError(f"cannot allocate {num_blocks} blocks")
        if not self.can_allocate(num_blocks):
            raise OutOfBlocksError(
                f"{num_blocks} KV blocks wanted, {self.num_available} of {self.num_blocks} are free"
            )
        for _ in range(num_blocks - len(self._free)):
            self._evict()
        blocks = [self._free.popleft() for _ in range(num_blocks)]
        references, total = self._references[holder], self._total
        for block in blocks:
            references[block] = total[block] = 1
        self._num_references[holder] += num_blocks
        if holder is Holder.TRANSFER:
            self._num_leased += num_blocks
        return blocks

    def add(self, blocks: Sequence[int], holder: Holder) -> None:
        """One more reference of `holder` for each of `blocks`, which somebody must hold already.

        Raises BlockAccountingError if one of them is free: what it held may be overwritten at any moment.
        """
        total, unused = self._total, self._unused
        self._check_exist(blocks)
        for block in blocks:
            if not total[block]:
                raise BlockAccountingError(
                    f"block {block} is free: it cannot be shared with a {holder.value}"
                )
        references = self._references[holder]
        leases, uses = holder is Holder.TRANSFER, holder is not Holder.CACHE
        for block in blocks:
            if leases and references[block] == 0:
                self._num_leased += 1
            references[block] += 1
            total[block] += 1
            if uses and unused:
                unused.pop(block, None)
        self._num_references[holder] += len(blocks)

    def drop(self, blocks: Sequence[int], holder: Holder) -> None:
        """Give back one reference of `holder` for each of `blocks`; a block without any reference is free.

        Raises BlockAccountingError if `holder` has fewer references than it drops.
        """
        references, total, cache = self._references[holder], self._total, self._cache
        self._check_exist(blocks)
        times = None if len(set(blocks)) == len(blocks) else Counter(blocks)
        for block in blocks:
            dropped = 1 if times is None else times[block]
            if references[block] < dropped:
                raise BlockAccountingError(
                    f"block {block} has {references[block]} {holder.value} references, {dropped} were dropped"
                )
        leased, used = holder is Holder.TRANSFER, holder is not Holder.CACHE
        for block in reversed(blocks):
            references[block] -= 1
            total[block] -= 1
            if leased and references[block] == 0:
                self._num_leased -= 1
            if total[block] == 0:
                if not used:
                    self._unused.pop(block, None)
                self._recycle(block)
            elif used and total[block] == cache[block]:
                self._unused[block] = None
        self._num_references[holder] -= len(blocks)

    def counts(self) -> BlockCounts:
        free, cached = len(self._free), len(self._unused)
        owned = self.num_blocks - free - cached - self._num_leased
        return BlockCounts(free, owned, self._num_leased, cached)

    def check(self) -> None:
        """Recount everything from the references; raises BlockAccountingError if the books do not agree."""
        everything = range(self.num_blocks)
        free = set(self._free)
        if len(free) != len(self._free):
            raise BlockAccountingError("a block is on the free list twice")
        totals = [sum(references[block] for references in self._references.values()) for block in everything]
        if totals != self._total:
            raise BlockAccountingError("a block has other references than the books say")
        unreferenced = {block for block in everything if not totals[block]}
        if free != unreferenced:
            raise BlockAccountingError(
                f"free but referenced, or unreferenced but not free: blocks {sorted(free ^ unreferenced)}"
            )
        unused = {block for block in everything if 0 < totals[block] == self._cache[block]}
        if unused != set(self._unused):
            wrong = sorted(unused ^ set(self._unused))
            raise BlockAccountingError(f"held by the cache only, or said to be, but not both: blocks {wrong}")
        num_leased = sum(count > 0 for count in self._references[Holder.TRANSFER])
        if num_leased != self._num_leased:
            raise BlockAccountingError(f"{num_leased} blocks are leased, the books say {self._num_leased}")
        for holder, references in self._references.items():
            if sum(references) != self._num_references[holder]:
                raise BlockAccountingError(
                    f"{sum(references)} {holder.value} references, the books say "
                    f"{self._num_references[holder]}"
                )

    def _evict(self) -> None:
        block, _ = self._unused.popitem(last=False)
        self._cache[block] -= 1
        self._total[block] -= 1
        self._num_references[Holder.CACHE] -= 1
        self._recycle(block)
        self._forget(block)

    def _recycle(self, block: int) -> None:
        self._generations[block] = (int(self._generations[block]) + 1) % _GENERATIONS
        self._free.append(block)

    def _check_exist(self, blocks: Sequence[int]) -> None:
        for block in (min(blocks), max(blocks)) if blocks else ():
            if not 0 <= block < self.num_blocks:
                raise BlockAccountingError(f"there is no block {block}: the pool has {self.num_blocks}")
