"""The prefix cache against the obvious model: what each block holds is written down beside it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.block_pool import BlockPool, Holder
from engine.prefix_cache import PrefixCache
from engine.prefix_digests import short

SIZE = 2
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=9)
salts = st.sampled_from(["", "a"])


class CacheMachine(RuleBasedStateMachine):
    """Sequences match, compute the rest, make it known, and end in any order, in a pool that is too small."""

    @initialize(num_blocks=st.integers(5, 12))
    def create(self, num_blocks: int) -> None:
        self.generations = [0] * num_blocks
        self.pool = BlockPool(num_blocks, SIZE, self.generations)
        self.cache = PrefixCache(self.pool, "model")
        # By block: salt and all tokens from the beginning of the sequence to the end of the block.
        self.holds: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.told: set[int] = set()
        self.live: list[tuple[str, list[int], list[int], bool]] = []  # salt, tokens, blocks, whether known

    @rule(token_ids=prompts, salt=salts)
    def start(self, token_ids: list[int], salt: str) -> None:
        digests = self.cache.digests(token_ids, salt)
        assert len(digests) == len(token_ids) // SIZE
        matched = self.cache.match(digests[: (len(token_ids) - 1) // SIZE])
        assert len(matched) * SIZE < len(token_ids)
        for index, block in enumerate(matched, start=1):
            assert self.holds[block] == (salt, tuple(token_ids[: index * SIZE]))
        self.pool.add(matched, Holder.SEQUENCE)
        rest = self.pool.num_blocks_for(len(token_ids)) - len(matched)
        if not self.pool.can_allocate(rest):
            self.pool.drop(matched, Holder.SEQUENCE)
            return
        blocks = matched + self.pool.allocate(rest, Holder.SEQUENCE)
        for index, block in list(enumerate(blocks, start=1))[len(matched) :]:
            self.holds[block] = (salt, tuple(token_ids[: index * SIZE]))
        self.live.append((salt, token_ids, blocks, False))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.live) - 1))
        salt, token_ids, blocks, known = self.live[index]
        if known:
            return
        table = self.cache.insert(self.cache.digests(token_ids, salt), blocks)
        for at, block in enumerate(table, start=1):
            assert self.holds[block] == (salt, tuple(token_ids[: at * SIZE])), "it goes on with other KV"
        assert self.cache.match(self.cache.digests(token_ids, salt)) == table[: len(token_ids) // SIZE]
        self.live[index] = (salt, token_ids, table, True)

    @rule()
    def tell(self) -> None:
        changes = self.cache.take_changes()
        assert not self.told & set(changes.stored)
        assert self.told >= set(changes.removed)
        self.told = (self.told | set(changes.stored)) - set(changes.removed)
        assert self.told == {short(digest) for digest in self.cache._digests.values()}

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        _, _, blocks, _ = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.pool.drop(blocks, Holder.SEQUENCE)

    @invariant()
    def books_agree(self) -> None:
        self.pool.check()
        assert self.pool.num_references(Holder.CACHE) == len(self.cache)
        assert self.pool.num_references(Holder.SEQUENCE) == sum(len(blocks) for _, _, blocks, _ in self.live)

    @invariant()
    def each_prefix_is_known_once_and_with_what_is_before_it(self) -> None:
        held = [self.holds[block] for block in self.cache._digests]
        assert len(set(held)) == len(held)
        for salt, token_ids in held:
            before = token_ids[:-SIZE]
            assert not before or (salt, before) in held, "taken from the cache before what follows it"


TestPrefixCache = CacheMachine.TestCase
TestPrefixCache.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def cached(pool: BlockPool, cache: PrefixCache, token_ids: list[int], salt: str = "") -> list[int]:
    """Blocks of a sequence that was computed and has ended."""
    blocks = pool.allocate(pool.num_blocks_for(len(token_ids)), Holder.SEQUENCE)
    table = cache.insert(cache.digests(token_ids, salt), blocks)
    pool.drop(table, Holder.SEQUENCE)
    return table


@pytest.mark.parametrize(("identity", "salt"), [("other", ""), ("model", "tenant")])
def test_another_model_or_tenant_finds_nothing(identity: str, salt: str) -> None:
    pool = BlockPool(4, SIZE, [0] * 4)
    cache = PrefixCache(pool, "model")
    cached(pool, cache, [1, 2, 3, 4])
    other = PrefixCache(BlockPool(4, SIZE, [0] * 4), identity)
    assert len(cache.match(cache.digests([1, 2, 3, 4], ""))) == 2
    assert not cache.match(other.digests([1, 2, 3, 4], salt))


def test_the_longest_unused_is_taken_first_and_its_generation_changes_only_then() -> None:
    generations = [0] * 4
    pool = BlockPool(4, SIZE, generations)
    cache = PrefixCache(pool, "model")
    first, second = cached(pool, cache, [1, 2, 3, 4]), cached(pool, cache, [5, 6, 7, 8])
    assert generations == [0] * 4
    pool.add(first, Holder.TRANSFER)
    pool.drop(first, Holder.TRANSFER)  # used again
    assert pool.allocate(1, Holder.SEQUENCE) == second[1:]
    assert pool.allocate(2, Holder.SEQUENCE) == [second[0], first[1]]
    assert cache.match(cache.digests([1, 2, 3, 4], "")) == first[:1]
    assert [generations[block] for block in (*first, *second)] == [0, 1, 1, 1]


def test_who_computes_what_another_made_known_goes_on_with_the_others_block() -> None:
    pool = BlockPool(8, SIZE, [0] * 8)
    cache = PrefixCache(pool, "model")
    token_ids = [1, 2, 3, 4, 5]
    digests = cache.digests(token_ids, "")
    first, second = pool.allocate(3, Holder.SEQUENCE), pool.allocate(3, Holder.SEQUENCE)
    assert cache.insert(digests, first) == first
    assert cache.insert(digests, second) == [*first[:2], second[2]]
    assert len(cache) == 2
    assert pool.counts().free == 4
