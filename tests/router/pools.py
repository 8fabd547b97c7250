"""Pools of workers for tests of cores."""

from __future__ import annotations

import random

from engine.latency import LatencyModel
from router.estimates import Estimates
from router.lengths import OutputLengths
from router.pair_table import LinkState, Pair, PairLink
from router.policies import POLICIES, PolicyInputs
from router.policy import Policy
from router.pool_view import WRITERS, PoolView, Role, WorkerCapacity, WorkerView
from router.prefix_index import PrefixIndex

CAPACITY = WorkerCapacity(block_size=16, num_blocks=256, max_num_seqs=8, max_batch_tokens=512)
LETTERS = {Role.PREFILL: "p", Role.DECODE: "d", Role.MIXED: "m"}

# About a CPU core with a small model: 1 ms a prompt token, 8 ms a step, 1.4 ms a sequence.
CORE = LatencyModel({"step": 0.008, "rows": 0.001, "decode_sequences": 0.0004, "decode_context": 2e-7})


def pool_of(
    prefill: int = 0,
    decode: int = 0,
    mixed: int = 0,
    capacity: WorkerCapacity = CAPACITY,
    model: LatencyModel | None = CORE,
) -> PoolView:
    """p0, p1 ... d0 ... m0 ..., each prefill worker linked to each writer."""
    pool = PoolView()
    for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode), (Role.MIXED, mixed)):
        for index in range(count):
            pool.add(WorkerView(f"{LETTERS[role]}{index}", 1, role, capacity, model))
    for reader in pool.up(Role.PREFILL):
        for writer in pool.up(*WRITERS):
            link(pool, reader.worker_id, writer.worker_id)
    return pool


def link(pool: PoolView, prefill: str, writer: str, state: LinkState = LinkState.LINKED) -> None:
    pool.pairs.put(Pair(prefill, writer), PairLink(state))


class Fixture:
    """A policy and all that it sees."""

    def __init__(self, name: str, pool: PoolView, seed: int = 0) -> None:
        self.pool = pool
        self.prefixes, self.lengths = PrefixIndex(pool), OutputLengths()
        self.estimates = Estimates(pool, self.prefixes, self.lengths)
        inputs = PolicyInputs(pool, self.prefixes, self.estimates, random.Random(seed), 100, 1.0)
        self.policy: Policy = POLICIES[name](inputs)
