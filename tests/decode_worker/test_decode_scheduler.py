"""Places, order and blocks of the decode scheduler: by example, and in any order of events."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decode_worker.scheduler import DecodeScheduler
from engine.block_pool import BlockPool, Holder
from engine.sequence import RequestKey, StopReason, TokenSampling

BLOCK_SIZE = 4


def key(name: object) -> RequestKey:
    return RequestKey(str(name), 0)


def limited(max_tokens: int) -> TokenSampling:
    return TokenSampling(0.0, 0, 1.0, 0, max_tokens, 0, frozenset({7}))


def make(max_num_seqs: int = 2) -> tuple[BlockPool, DecodeScheduler]:
    pool = BlockPool(64, BLOCK_SIZE, [0] * 64)
    return pool, DecodeScheduler(pool, max_num_seqs)


def add(pool: BlockPool, scheduler: DecodeScheduler, name: object, max_tokens: int, now: float = 0.0) -> None:
    blocks = pool.allocate(pool.num_blocks_for(6 + max_tokens), Holder.SEQUENCE)
    scheduler.add(key(name), 6, 1, limited(max_tokens), blocks, now)


def test_the_first_input_is_the_token_that_prefill_drew() -> None:
    pool, scheduler = make()
    add(pool, scheduler, "a", 3, now=1.0)
    (chunk,) = scheduler.schedule(2.5)
    assert (chunk.token_ids, chunk.start, chunk.num_output_tokens) == ([1], 6, 1)
    (first,) = scheduler.complete([20])
    assert (first.index, first.token_id, first.stop_reason, first.decode_queue_s) == (1, 20, None, 1.5)
    (chunk,) = scheduler.schedule(3.0)
    assert (chunk.token_ids, chunk.start, chunk.num_output_tokens) == ([20], 7, 2)
    (last,) = scheduler.complete([21])
    assert (last.index, last.stop_reason, last.decode_queue_s) == (2, StopReason.LENGTH, None)
    assert pool.counts().free == 64
    assert scheduler.schedule(4.0) == []


def test_a_stop_token_ends_the_sequence() -> None:
    pool, scheduler = make()
    add(pool, scheduler, "a", 10)
    scheduler.schedule(0.0)
    (decoded,) = scheduler.complete([7])
    assert decoded.stop_reason is StopReason.STOP
    assert pool.counts().free == 64


def test_a_place_goes_to_who_waits_longest() -> None:
    pool, scheduler = make(max_num_seqs=1)
    for name in "abc":
        add(pool, scheduler, name, 2)
    assert (scheduler.num_ready, scheduler.num_running) == (3, 0)
    served = []
    while scheduler.schedule(0.0):
        served += [decoded.key for decoded in scheduler.complete([5])]
    assert served == [key("a"), key("b"), key("c")]


def test_a_runner_that_draws_nothing_is_an_error() -> None:
    pool, scheduler = make()
    add(pool, scheduler, "a", 3)
    scheduler.schedule(0.0)
    with pytest.raises(ValueError, match="drew 0 tokens for 1 sequences"):
        scheduler.complete([None])


@settings(max_examples=300)
@given(
    answers=st.lists(st.integers(2, 12), min_size=1, max_size=12),
    max_num_seqs=st.integers(1, 5),
    events=st.lists(st.sampled_from(["add", "step", "step", "cancel", "fail"]), max_size=60),
    data=st.data(),
)
def test_any_order_of_events(
    answers: list[int], max_num_seqs: int, events: list[str], data: st.DataObject
) -> None:
    pool, scheduler = make(max_num_seqs)
    left = list(enumerate(answers))
    alive: dict[RequestKey, int] = {}
    tokens: dict[RequestKey, int] = {}
    joined: list[RequestKey] = []

    def step(fail: bool) -> None:
        chunks = scheduler.schedule(0.0)
        assert len(chunks) == min(max_num_seqs, len(alive)), "a place is left empty"
        for chunk in chunks:
            assert chunk.start < len(chunk.block_table) * BLOCK_SIZE
        if fail:
            for gone in scheduler.abandon():
                del alive[gone]
            return
        for decoded in scheduler.complete([9] * len(chunks)):
            if decoded.decode_queue_s is not None:
                joined.append(decoded.key)
            tokens[decoded.key] = tokens.get(decoded.key, 1) + 1
            assert decoded.index == tokens[decoded.key] - 1
            assert (decoded.stop_reason is not None) == (tokens[decoded.key] == alive[decoded.key])
            if decoded.stop_reason is not None:
                del alive[decoded.key]

    for event in [*events, *["add"] * len(answers)]:
        match event:
            case "add" if left:
                name, max_tokens = left.pop(0)
                alive[key(name)] = max_tokens
                add(pool, scheduler, name, max_tokens)
            case "step" | "fail":
                step(event == "fail")
            case "cancel" if alive:
                gone = data.draw(st.sampled_from(sorted(alive, key=str)))
                assert scheduler.cancel(gone)
                assert not scheduler.cancel(gone)
                del alive[gone]
        pool.check()
        assert pool.counts().owned == scheduler.num_blocks
        assert scheduler.num_ready + scheduler.num_running == len(alive)

    for _ in range(sum(answers)):
        step(fail=False)
    assert not alive
    assert [int(k.request_id) for k in joined] == sorted(int(k.request_id) for k in joined)
    assert pool.counts().free == 64
