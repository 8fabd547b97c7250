"""The ledger on top of snapshots: in step with a worker that hears late and answers late."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine.sequence import RequestKey
from router.pool_view import Load, PoolView, Role, WorkerCapacity, WorkerView

CAPACITY = WorkerCapacity(block_size=16, num_blocks=64, max_num_seqs=8, max_batch_tokens=256)


class LedgerMachine(RuleBasedStateMachine):
    """A worker whose commands are under way for a while, and the router's view of it."""

    keys = Bundle("keys")

    def __init__(self):
        super().__init__()
        self.view = WorkerView("w", 1, Role.DECODE, CAPACITY)
        self.count = 0
        self.commands = []  # sent, in order: key
        self.heard = 0
        self.placed = {}  # by the router: key -> (tokens, blocks)
        self.held = {}  # by the worker: the same

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

    @rule(key=consumes(keys))
    def end(self, key):
        del self.placed[key]
        self.held.pop(key, None)
        self.view.release(key)
        self.view.release(key)

    @rule()
    def snapshot(self):
        self.view.snapshot(
            Load(
                commands_seen=self.heard,
                requests=len(self.held),
                queue_tokens=sum(tokens for tokens, _ in self.held.values()),
                free_blocks=CAPACITY.num_blocks - sum(blocks for _, blocks in self.held.values()),
            ),
            now=0.0,
        )

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
