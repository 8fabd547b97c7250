"""The ledger on top of snapshots: in step with a worker that hears late and answers late."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine.sequence import RequestKey
from router.pair_table import LinkState, Pair, PairLink
from router.pool_view import READERS, WRITERS, Load, PoolView, Role, WorkerCapacity, WorkerView

CAPACITY = WorkerCapacity(block_size=16, num_blocks=64, max_num_seqs=8, max_batch_tokens=256)


class LedgerMachine(RuleBasedStateMachine):
    """A mixed worker whose commands are under way for a while, and the router's view of it. Its snapshots may
    be lost, or come again when newer ones have come."""

    keys = Bundle("keys")

    def __init__(self):
        super().__init__()
        self.view = WorkerView("w", 1, Role.MIXED, CAPACITY)
        self.count = 0
        self.commands = []  # sent, in order: key
        self.heard = 0
        self.placed = {}  # by the router: key -> (tokens that are not read, blocks)
        self.held = {}  # by the worker: the same
        self.snapshots = []

    @rule(target=keys, tokens=st.integers(1, 100), blocks=st.integers(1, 9))
    def place(self, tokens, blocks):
        self.count += 1
        key = RequestKey(f"r{self.count}", 1)
        self.view.credit(key, tokens, blocks)
        self.placed[key] = (tokens, blocks)
        self.commands.append(key)
        self.view.sent(key, len(self.commands))
        return key

    @rule()
    def worker_hears(self):
        if self.heard < len(self.commands):
            key = self.commands[self.heard]
            self.heard += 1
            if key in self.placed:
                self.held[key] = self.placed[key]

    @rule(key=keys)
    def read(self, key):
        if key in self.held:
            self.placed[key] = self.held[key] = (0, self.held[key][1])
            self.view.emitted(key, 1)

    @rule(key=consumes(keys))
    def end(self, key):
        del self.placed[key]
        self.held.pop(key, None)
        self.view.release(key)
        self.view.release(key)
        self.view.emitted(key, 1)

    @rule(is_lost=st.booleans())
    def snapshot(self, is_lost):
        load = Load(
            commands_seen=self.heard,
            requests=len(self.held),
            queue_tokens=sum(tokens for tokens, _ in self.held.values()),
            free_blocks=CAPACITY.num_blocks - sum(blocks for _, blocks in self.held.values()),
            seq=len(self.snapshots) + 1,
        )
        self.snapshots.append(load)
        if not is_lost:
            self.view.snapshot(load, now=0.0)
            self.newest = load.seq

    newest = 0

    @rule(data=st.data())
    def an_old_snapshot(self, data):
        if self.newest:
            self.view.snapshot(data.draw(st.sampled_from(self.snapshots[: self.newest])), now=0.0)

    @invariant()
    def the_view_is_what_was_placed(self):
        # This worker forgets at once what ends, so the estimate is exact, however late snapshots are.
        assert self.view.live_requests == len(self.placed)
        assert self.view.requests == len(self.placed)
        assert self.view.outstanding_tokens == sum(tokens for tokens, _ in self.placed.values())
        used = sum(blocks for _, blocks in self.placed.values())
        assert self.view.free_blocks == max(0, CAPACITY.num_blocks - used)


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_load_of_other_routers_counts():
    view = WorkerView("w", 1, Role.PREFILL, CAPACITY)
    view.snapshot(Load(commands_seen=1, requests=3, queue_tokens=300, free_blocks=50), now=0.0)
    view.credit(RequestKey("mine", 1), tokens=40, blocks=5)
    assert (view.requests, view.outstanding_tokens, view.free_blocks) == (4, 340, 45)


def test_a_refusal_is_believed_until_the_next_snapshot():
    view = WorkerView("w", 1, Role.DECODE, CAPACITY)
    view.refuse()
    assert view.free_blocks == 0
    view.snapshot(Load(commands_seen=0, requests=0, queue_tokens=0, free_blocks=64), now=0.0)
    assert view.free_blocks == 64


def test_an_old_snapshot_is_no_news():
    view = WorkerView("w", 1, Role.DECODE, CAPACITY)
    view.snapshot(Load(commands_seen=0, requests=3, queue_tokens=30, free_blocks=9, seq=7), now=1.0)
    view.refuse()
    for seq in (6, 7):
        view.snapshot(Load(commands_seen=0, requests=0, queue_tokens=0, free_blocks=64, seq=seq), now=2.0)
        assert (view.requests, view.refused) == (3, True)
    # Those between that did not come are not missed.
    view.snapshot(Load(commands_seen=0, requests=1, queue_tokens=0, free_blocks=60, seq=19), now=2.0)
    assert (view.requests, view.free_blocks) == (1, 60)


def test_a_pool_needs_both_roles():
    pool = PoolView()
    assert pool.missing_role() is Role.PREFILL
    pool.add(WorkerView("p", 1, Role.PREFILL, CAPACITY))
    assert pool.missing_role() is Role.DECODE
    assert pool.largest_decode_tokens() is None
    pool.add(WorkerView("d", 1, Role.DECODE, CAPACITY))
    assert pool.missing_role() is None
    assert pool.largest_decode_tokens() == 1024
    pool["p"].up = False
    assert pool.missing_role() is Role.PREFILL
    # A mixed worker does what both do.
    pool.add(WorkerView("m", 1, Role.MIXED, replace(CAPACITY, num_blocks=100)))
    assert pool.missing_role() is None
    assert pool.largest_decode_tokens() == 1600
    pool.down("m")
    assert pool.missing_role() is Role.PREFILL
    assert pool.largest_decode_tokens() == 1024


def test_a_mixed_worker_needs_no_link():
    pool = PoolView()
    for name, role in (("p", Role.PREFILL), ("d", Role.DECODE)):
        pool.add(WorkerView(name, 1, role, CAPACITY))
    assert pool.why_no_pair() == (False, "d and p are linking")
    pool.pairs.put(Pair("p", "d"), PairLink(LinkState.LINKED))
    assert pool.why_no_pair() is None
    pool.pairs.put(Pair("p", "d"), PairLink(LinkState.MISMATCHED, "dtype"))
    assert pool.why_no_pair() == (True, "d and p do not fit together: dtype")
    pool.add(WorkerView("m", 1, Role.MIXED, CAPACITY))
    assert pool.why_no_pair() is None
    # One that is up no more leaves the others where they were.
    pool.down("m")
    assert pool.why_no_pair() == (True, "d and p do not fit together: dtype")


CHANGES = st.tuples(
    st.sampled_from(["add", "down", "remove", "suspect", "trust"]),
    st.sampled_from("abcd"),
    st.sampled_from(list(Role)),
)


@given(changes=st.lists(CHANGES, max_size=40))
def test_lists_of_workers_are_never_stale(changes):
    pool = PoolView()
    for what, name, role in changes:
        worker = pool.get(name)
        if what == "add":
            pool.add(WorkerView(name, 1, role, CAPACITY))
        elif worker is not None and what == "down":
            pool.down(name)
        elif worker is not None and what == "remove":
            pool.remove(name)
        elif worker is not None:
            worker.suspected = what == "suspect"
        for roles in ((Role.PREFILL,), (Role.MIXED,), READERS, WRITERS):
            up = [one for one in pool if one.up and one.role in roles]
            assert list(pool.up(*roles)) == up
            assert list(pool.placeable(*roles)) == [one for one in up if not one.suspected]
        sizes = [one.capacity.num_tokens for one in pool if one.up and one.role.writes]
        assert pool.largest_decode_tokens() == max(sizes, default=None)


def test_what_a_role_does():
    assert READERS == (Role.PREFILL, Role.MIXED)
    assert WRITERS == (Role.DECODE, Role.MIXED)
