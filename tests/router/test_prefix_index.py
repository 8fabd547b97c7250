"""Which worker holds which prefix: what the workers' own caches would say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.block_pool import BlockPool, Holder
from engine.prefix_cache import PrefixCache
from engine.prefix_digests import prefix_digests, short
from engine.sequence import TokenSampling
from router.pool_view import PoolView, Role, WorkerCapacity, WorkerView
from router.prefix_index import PrefixIndex, cache_salt
from router.requests import Request
from router.slo import Slo, SloLimits

SAMPLING = TokenSampling(
    temperature=0.0, top_k=0, top_p=1.0, seed=0, max_tokens=9, min_tokens=0, stop_token_ids=frozenset()
)
SIZES = {"p0": 2, "p1": 2, "d0": 3}
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=10)


def request(name, token_ids, tenant=""):
    limits = SloLimits(1.0, 1.0)
    return Request(name, tuple(token_ids), SAMPLING, (), Slo("default", limits), tenant, 0.0, 60.0)


def pool_of(sizes, num_blocks=8, fingerprint="model"):
    pool = PoolView()
    for worker_id, size in sizes.items():
        role = Role.PREFILL if worker_id.startswith("p") else Role.DECODE
        pool.add(WorkerView(worker_id, 1, role, WorkerCapacity(size, num_blocks, 4, 64, fingerprint)))
    return pool


def digests_of(token_ids, size=2, salt="", fingerprint="model"):
    return [short(digest) for digest in prefix_digests(fingerprint, salt, size, token_ids)]


class IndexMachine(RuleBasedStateMachine):
    """Workers with small caches and blocks of different sizes, which the index is told of now and then."""

    @initialize()
    def create(self):
        self.index = PrefixIndex(pool_of(SIZES), max_requests=5)
        self.count = 0
        for worker_id in SIZES:
            self.start(worker_id)

    def start(self, worker_id):
        pools = getattr(self, "pools", {})
        pools[worker_id] = BlockPool(8, SIZES[worker_id], [0] * 8)
        self.pools = pools
        self.caches = getattr(self, "caches", {}) | {worker_id: PrefixCache(pools[worker_id], "model")}

    @rule(worker_id=st.sampled_from(sorted(SIZES)), token_ids=PROMPTS, tenant=st.sampled_from(["", "a"]))
    def read(self, worker_id, token_ids, tenant):
        pool, cache = self.pools[worker_id], self.caches[worker_id]
        blocks = pool.allocate(pool.num_blocks_for(len(token_ids)), Holder.SEQUENCE)
        pool.drop(cache.insert(cache.digests(token_ids, tenant), blocks), Holder.SEQUENCE)
        self.tell(worker_id)

    def tell(self, worker_id):
        changes = self.caches[worker_id].take_changes()
        self.index.removed(worker_id, changes.removed)
        self.index.stored(worker_id, changes.stored)

    @rule(worker_id=st.sampled_from(sorted(SIZES)))
    def live_anew(self, worker_id):
        self.index.forget(worker_id)
        self.start(worker_id)

    @rule(worker_id=st.sampled_from(sorted(SIZES)), digest=st.integers(0, 9))
    def what_is_not_known_is_forgotten(self, worker_id, digest):
        self.index.removed(worker_id, [digest])

    @rule(token_ids=PROMPTS, tenant=st.sampled_from(["", "a"]), answered=st.integers(0, 2))
    def look_up(self, token_ids, tenant, answered):
        self.count += 1
        asked = request(f"r{self.count % 8}-{token_ids}{tenant}", token_ids, tenant)
        asked = asked.going_on(range(answered))
        held = {}
        for worker_id, cache in self.caches.items():
            tokens = asked.prompt_token_ids + asked.answered
            full = (len(tokens) - 1) // SIZES[worker_id]
            matched = cache.match(cache.digests(tokens, tenant)[:full])
            held[worker_id] = len(matched) * SIZES[worker_id]
            assert self.index.cached_tokens(worker_id, asked) == held[worker_id]
        found = list(self.index.holders(asked))
        assert set(found) == {worker_id for worker_id, tokens in held.items() if tokens}
        assert held[found[0]] == max(held.values()) if found else not any(held.values())

    @invariant()
    def it_knows_what_is_cached_and_no_more(self):
        assert len(self.index) == sum(len(cache) for cache in self.caches.values())


TestPrefixIndex = IndexMachine.TestCase
TestPrefixIndex.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(
    "other", [{"tenant": "somebody"}, {"fingerprint": "another model"}], ids=["tenant", "model"]
)
def test_what_others_hold_is_not_found(other):
    tokens = list(range(9))
    pool = pool_of({"p0": 2}, fingerprint=other.get("fingerprint", "model"))
    index = PrefixIndex(pool)
    index.stored("p0", digests_of(tokens))
    assert index.cached_tokens("p0", request("r", tokens, other.get("tenant", ""))) == 0


def test_what_is_stored_later_is_found():
    tokens = list(range(33))
    index, asked = PrefixIndex(pool_of({"p0": 2, "p1": 2})), request("r", tokens)
    digests = digests_of(tokens)
    for worker_id in ("p1", "p0"):
        for num_blocks in (1, 4, 5, 16):
            index.stored(worker_id, digests[:num_blocks])
            assert index.cached_tokens(worker_id, asked) == 2 * num_blocks
    index.removed("p0", digests[3:])
    assert index.cached_tokens("p0", asked) == 6
    assert list(index.holders(asked)) == ["p1", "p0"]


def test_the_last_token_is_always_computed():
    tokens = list(range(8))
    index = PrefixIndex(pool_of({"p0": 2}))
    index.stored("p0", digests_of(tokens))
    assert index.cached_tokens("p0", request("r", tokens)) == 6
    assert index.cached_tokens("p0", request("s", [*tokens, 8])) == 8


def test_an_answer_that_has_begun_is_part_of_it():
    tokens = list(range(9))
    index = PrefixIndex(pool_of({"p0": 2}))
    index.stored("p0", digests_of(tokens))
    assert index.cached_tokens("p0", request("r", tokens[:3]).going_on(tokens[3:])) == 8
    assert index.cached_tokens("p0", request("r", tokens[:3])) == 2


def test_a_few_holders_are_enough():
    names = {f"p{index}": 2 for index in range(50)}
    index, tokens = PrefixIndex(pool_of(names)), list(range(20))
    for number, worker_id in enumerate(names):
        index.stored(worker_id, digests_of(tokens)[: 1 + number % 7])
    found = list(index.holders(request("r", tokens)))
    assert len(found) == 4
    assert [int(name[1:]) % 7 for name in found] == [6] * 4


def test_memory_is_that_of_the_blocks_that_are_held():
    index = PrefixIndex(pool_of({"p0": 2, "p1": 2}), max_requests=10)
    tokens = list(range(64))
    for worker_id in ("p0", "p1"):
        index.stored(worker_id, digests_of(tokens))
    for number in range(100):
        index.cached_tokens("p0", request(f"r{number}", tokens))
    assert len(index) == 64
    assert index.num_requests == 10
    index.forget("p0")
    index.removed("p1", digests_of(tokens))
    assert len(index) == 0
    assert not list(index.holders(request("new", tokens)))


def test_the_salt_of_a_tenant_is_always_text():
    assert cache_salt(request("r", [1], "käse")) == "käse"
    assert cache_salt(replace(request("r", [1]), tenant="a\udcff")) == "a\\udcff"
