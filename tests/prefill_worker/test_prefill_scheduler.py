"""Order, budget and blocks of the prefill scheduler: by example, and in any order of events."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_pool import BlockPool, Holder
from engine.latency import LatencyModel, OnlineLatency
from engine.prefix_cache import PrefixCache
from engine.sequence import ChunkResult, RequestKey, ScheduledChunk, StopReason, TokenSampling
from prefill_worker.scheduler import PrefillScheduler

SAMPLING = TokenSampling(0.0, 0, 1.0, 0, 10, 0, frozenset({7}))


def key(name: object) -> RequestKey:
    return RequestKey(str(name), 0)


def results(*token_ids: int | None) -> list[ChunkResult]:
    return [ChunkResult(token_id) for token_id in token_ids]


def make(num_blocks: int = 100, budget: int = 16) -> tuple[BlockPool, PrefillScheduler]:
    pool = BlockPool(num_blocks, 4, [0] * num_blocks)
    return pool, PrefillScheduler(
        pool, PrefixCache(pool, "model"), budget, OnlineLatency(LatencyModel.unknown())
    )


def spans(chunks: Sequence[ScheduledChunk]) -> list[tuple[int, int, bool]]:
    """(start, length, last) of each chunk."""
    return [(chunk.start, len(chunk.token_ids), chunk.sampling is not None) for chunk in chunks]


def test_prompts_share_the_budget_in_order_of_arrival() -> None:
    _, scheduler = make()
    for name, num_tokens in (("a", 10), ("b", 20), ("c", 3)):
        scheduler.add(key(name), list(range(num_tokens)), 0, SAMPLING, "", None, 0.0)
    assert scheduler.queue_tokens == 33
    assert spans(scheduler.schedule(1.0)) == [(0, 10, True), (0, 6, False)]
    (a,) = scheduler.complete(results(1, None), 2.0)
    assert (a.key, a.first_token, a.num_tokens) == (key("a"), 1, 10)
    assert (a.prefill_queue_s, a.prefill_s, a.stop_reason) == (1.0, 1.0, None)
    chunks = scheduler.schedule(3.0)
    assert spans(chunks) == [(6, 14, True), (0, 2, False)]
    assert list(chunks[0].token_ids) == list(range(6, 20))
    (b,) = scheduler.complete(results(2, None), 4.0)
    assert (b.key, b.prefill_queue_s, b.prefill_s) == (key("b"), 1.0, 3.0)
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.queue_tokens) == (0, 1, 1)


def test_a_first_token_may_end_the_answer() -> None:
    _, scheduler = make()
    scheduler.add(key("stop"), [1], 0, SAMPLING, "", None, 0.0)
    once = TokenSampling(0.0, 0, 1.0, 0, 1, 0, frozenset())
    scheduler.add(key("length"), [1], 0, once, "", None, 0.0)
    scheduler.schedule(0.0)
    stop, length = scheduler.complete(results(7, 7), 0.0)
    assert (stop.stop_reason, length.stop_reason) == (StopReason.STOP, StopReason.LENGTH)


def test_a_head_that_lacks_blocks_lets_nobody_pass() -> None:
    pool, scheduler = make(num_blocks=5)
    held = pool.allocate(2, Holder.TRANSFER)
    scheduler.add(key("long"), [1] * 16, 0, SAMPLING, "", None, 0.0)
    scheduler.add(key("short"), [1], 0, SAMPLING, "", None, 0.0)
    assert scheduler.schedule(0.0) == []
    pool.drop(held, Holder.TRANSFER)
    assert spans(scheduler.schedule(0.0)) == [(0, 16, True)]


def test_a_runner_that_draws_nothing_after_the_last_chunk_is_an_error() -> None:
    _, scheduler = make()
    scheduler.add(key("a"), [1], 0, SAMPLING, "", None, 0.0)
    scheduler.schedule(0.0)
    with pytest.raises(ValueError, match="drew None after 1 tokens of a#0"):
        scheduler.complete(results(None), 0.0)


@settings(max_examples=300)
@given(
    prompts=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    budget=st.integers(1, 24),
    num_blocks=st.integers(10, 30),
    events=st.lists(st.sampled_from(["add", "step", "step", "cancel", "fail", "free"]), max_size=60),
    data=st.data(),
)
def test_any_order_of_events(
    prompts: list[int], budget: int, num_blocks: int, events: list[str], data: st.DataObject
) -> None:
    pool, scheduler = make(num_blocks, budget)
    left = list(enumerate(prompts))
    alive: dict[RequestKey, int] = {}
    started: list[int] = []
    handed_over: list[Sequence[int]] = []
    computed: dict[RequestKey, int] = {}

    def step(fail: bool) -> None:
        chunks = scheduler.schedule(0.0)
        assert sum(len(chunk.token_ids) for chunk in chunks) <= budget
        assert sum(chunk.sampling is None for chunk in chunks) <= 1, "two prompts are half done"
        for chunk in chunks:
            name = chunk.token_ids[0]
            at = computed.setdefault(key(name), 0)
            assert chunk.start == at
            assert len(chunk.block_table) == pool.num_blocks_for(alive[key(name)])
            computed[key(name)] += len(chunk.token_ids)
            if name not in started:
                started.append(name)
        if fail:
            assert scheduler.abandon() == [key(chunk.token_ids[0]) for chunk in chunks]
            for chunk in chunks:
                del alive[key(chunk.token_ids[0])]
            return
        tokens = [None if chunk.sampling is None else 3 for chunk in chunks]
        for done in scheduler.complete(results(*tokens), 0.0):
            assert computed[done.key] == alive.pop(done.key) == done.num_tokens
            handed_over.append(done.blocks)
        if not chunks and alive:
            assert handed_over, "nothing runs, nothing is held, and yet somebody waits"

    for event in [*events, *["add"] * len(prompts)]:
        match event:
            case "add" if left:
                name, num_tokens = left.pop(0)
                alive[key(name)] = num_tokens
                scheduler.add(key(name), [name] * num_tokens, 0, SAMPLING, "", None, 0.0)
            case "step" | "fail":
                step(event == "fail")
            case "cancel" if alive:
                gone = data.draw(st.sampled_from(sorted(alive, key=str)))
                assert scheduler.cancel(gone)
                assert not scheduler.cancel(gone)
                del alive[gone]
            case "free" if handed_over:
                pool.drop(handed_over.pop(0), Holder.SEQUENCE)
        pool.check()
        held = sum(map(len, handed_over))
        assert pool.num_references(Holder.SEQUENCE) == scheduler.num_blocks + held
        assert scheduler.num_waiting + scheduler.num_running == len(alive)
        assert scheduler.queue_tokens == sum(n - computed.get(k, 0) for k, n in alive.items())

    # Everybody who is left gets through.
    for _ in range(sum(prompts) + len(prompts)):
        step(fail=False)
        while handed_over:
            pool.drop(handed_over.pop(), Holder.SEQUENCE)
    assert not alive
    assert started == sorted(started), "somebody was overtaken"
    assert pool.counts().available == num_blocks
