"""The block pool against a plain model of it: sets of references, in any order of calls."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.block_pool import BlockCounts, BlockPool, Generations, Holder
from engine.errors import BlockAccountingError, OutOfBlocksError

holders = st.sampled_from(Holder)


class PoolMachine(RuleBasedStateMachine):
    """Holds references as workers do, an entry of `held` for each call, and drops them in any order."""

    @initialize(num_blocks=st.integers(1, 12), shared=st.booleans(), start=st.sampled_from([0, 2**32 - 2]))
    def create(self, num_blocks: int, shared: bool, start: int) -> None:
        self.generations: Generations = (
            np.full(num_blocks, start, dtype=np.uint32) if shared else [start] * num_blocks
        )
        self.pool = BlockPool(num_blocks, 16, self.generations)
        self.held: list[tuple[list[int], Holder]] = []
        self.freed = [start] * num_blocks
        self.pool.tell(self.taken_from_the_cache)
        self.taken: list[int] = []

    def taken_from_the_cache(self, block: int) -> None:
        """The pool drops one CACHE reference by itself."""
        mine = [each for each in self.held if each[1] is Holder.CACHE and block in each[0]]
        assert len(mine) == 1
        mine[0][0].remove(block)
        self.freed[block] = (self.freed[block] + 1) % 2**32
        self.taken.append(block)

    def references(self, block: int, holder: Holder) -> int:
        return sum(blocks.count(block) for blocks, by in self.held if by is holder)

    def cached(self) -> set[int]:
        return {
            block
            for block in range(self.pool.num_blocks)
            if self.references(block, Holder.CACHE)
            and not self.references(block, Holder.SEQUENCE) + self.references(block, Holder.TRANSFER)
        }

    def free(self) -> set[int]:
        return set(range(self.pool.num_blocks)) - {block for blocks, _ in self.held for block in blocks}

    @rule(wanted=st.integers(0, 14), holder=st.sampled_from([Holder.SEQUENCE, Holder.TRANSFER]))
    def allocate(self, wanted: int, holder: Holder) -> None:
        free, cached = self.free(), self.cached()
        available = len(free) + len(cached)
        assert self.pool.can_allocate(wanted) == (wanted <= available)
        if wanted > available:
            with pytest.raises(OutOfBlocksError, match=f"{wanted} KV blocks wanted, {available} of"):
                self.pool.allocate(wanted, holder)
        else:
            self.taken = []
            blocks = self.pool.allocate(wanted, holder)
            assert len(set(blocks)) == wanted
            assert set(blocks) <= free | cached
            # What is cached is given up only for want of free blocks.
            assert len(self.taken) == max(0, wanted - len(free))
            self.held.append((blocks, holder))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), holder=holders)
    def add(self, data: st.DataObject, holder: Holder) -> None:
        blocks, _ = data.draw(st.sampled_from(self.held))
        if holder is Holder.CACHE:  # the cache holds a block once
            blocks = [block for block in blocks if not self.references(block, holder)]
        self.pool.add(blocks, holder)
        self.held.append((list(blocks), holder))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        blocks, holder = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.drop(blocks, holder)
        for block in set(blocks) & self.free():  # what the cache still holds is not given up
            self.freed[block] = (self.freed[block] + 1) % 2**32

    @rule(data=st.data(), holder=holders)
    def add_free(self, data: st.DataObject, holder: Holder) -> None:
        wrong = data.draw(st.sampled_from([*sorted(self.free()), -1, self.pool.num_blocks]))
        held = [block for blocks, _ in self.held for block in blocks]
        with pytest.raises(BlockAccountingError, match=f"block {wrong}"):
            self.pool.add([*held, wrong], holder)

    @rule(data=st.data(), holder=holders)
    def drop_too_often(self, data: st.DataObject, holder: Holder) -> None:
        wrong = data.draw(st.integers(0, self.pool.num_blocks - 1))
        held = [block for blocks, by in self.held if by is holder for block in blocks]
        with pytest.raises(BlockAccountingError, match=f"block {wrong} has"):
            self.pool.drop([*held, wrong], holder)

    @invariant()
    def books_agree(self) -> None:
        self.pool.check()
        free = self.free()
        leased = {b for b in range(self.pool.num_blocks) if self.references(b, Holder.TRANSFER)}
        cached = self.cached()
        owned = self.pool.num_blocks - len(free) - len(leased) - len(cached)
        assert self.pool.counts() == BlockCounts(len(free), owned, len(leased), len(cached))
        assert self.pool.num_available == len(free) + len(cached)
        for holder in Holder:
            assert self.pool.num_references(holder) == sum(len(b) for b, by in self.held if by is holder)
        assert [self.generations[block] for block in range(self.pool.num_blocks)] == self.freed


TestBlockPool = PoolMachine.TestCase


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_num_blocks_for(tokens: int, blocks: int) -> None:
    assert BlockPool(1, 16, [0]).num_blocks_for(tokens) == blocks


def test_a_freed_block_rests_while_others_are_free() -> None:
    pool = BlockPool(4, 16, [0] * 4)
    first = pool.allocate(1, Holder.SEQUENCE)
    pool.drop(first, Holder.SEQUENCE)
    assert not set(first) & set(pool.allocate(3, Holder.SEQUENCE))


def test_impossible_pools_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BlockPool(0, 16, [])
    with pytest.raises(ValueError, match="2 generations for 3 blocks"):
        BlockPool(3, 16, [0, 0])
    with pytest.raises(ValueError, match="cannot allocate -1"):
        BlockPool(3, 16, [0] * 3).allocate(-1, Holder.SEQUENCE)


@pytest.mark.parametrize("damage", ["free twice", "free but held", "leased", "cached", "references"])
def test_check_finds_damaged_books(damage: str) -> None:
    pool = BlockPool(3, 16, [0] * 3)
    (block,) = pool.allocate(1, Holder.SEQUENCE)
    match damage:
        case "free twice":
            pool._free.append(pool._free[0])
        case "free but held":
            pool._free.append(block)
        case "cached":
            pool._references[Holder.CACHE][block] += 1
            pool._references[Holder.SEQUENCE][block] -= 1
        case "references":
            pool._references[Holder.SEQUENCE][block] += 1
        case "leased":
            pool._references[Holder.TRANSFER][block] += 1
    with pytest.raises(BlockAccountingError):
        pool.check()
