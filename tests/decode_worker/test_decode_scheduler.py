"""Places, order, blocks and preemption of the decode scheduler: by example, and in any order of events."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_pool import Holder
from engine.fake import fake_answer
from engine.sequence import ChunkResult, RequestKey, StopReason
from tests.decode_worker.scheduler_bench import BLOCK_SIZE, Bench, key, limited


def test_the_first_input_is_the_token_that_prefill_drew() -> None:
    bench = Bench()
    bench.add("a", 6, 3, now=1.0)
    first = bench.answers[key("a")][0]
    (chunk,) = bench.scheduler.schedule(2.5)
    assert (chunk.token_ids, chunk.start, chunk.num_output_tokens) == ([first], 6, 1)
    (decoded,) = bench.scheduler.complete([ChunkResult(20)], 2.5, 3.0)
    assert (decoded.index, decoded.token_id, decoded.stop_reason) == (1, 20, None)
    assert decoded.decode_queue_s == 1.5
    (chunk,) = bench.scheduler.schedule(3.0)
    assert (chunk.token_ids, chunk.start, chunk.num_output_tokens) == ([20], 7, 2)
    (last,) = bench.scheduler.complete([ChunkResult(21)], 3.0, 4.0)
    assert (last.index, last.stop_reason, last.decode_queue_s) == (2, StopReason.LENGTH, None)
    assert bench.pool.counts().available == 64
    assert bench.scheduler.schedule(4.0) == []


def test_a_stop_token_ends_the_sequence() -> None:
    bench = Bench()
    bench.add("a", 6, 10)
    bench.scheduler.schedule(0.0)
    (decoded,) = bench.scheduler.complete([ChunkResult(7)], 0.0, 0.0)
    assert decoded.stop_reason is StopReason.STOP
    assert bench.pool.counts().available == 64


def test_a_place_goes_to_who_waits_longest() -> None:
    bench = Bench(max_num_seqs=1)
    for name in "abc":
        bench.add(name, 6, 2)
    assert (bench.scheduler.num_waiting, bench.scheduler.num_running) == (3, 0)
    assert [*bench.step(), *bench.step(), *bench.step()] == [key("a"), key("b"), key("c")]


def test_a_runner_that_draws_nothing_is_an_error() -> None:
    bench = Bench()
    bench.add("a", 6, 3)
    bench.scheduler.schedule(0.0)
    with pytest.raises(ValueError, match="drew None after 1 tokens of a#0"):
        bench.scheduler.complete([ChunkResult(None)], 0.0, 0.0)


def test_who_arrived_last_gives_way_and_comes_back_with_the_same_answer() -> None:
    """Three sequences of 2 blocks grow to 5 each; the pool has 8."""
    bench = Bench(num_blocks=8, max_num_seqs=3, max_batch_tokens=3)
    for name in "abc":
        blocks = bench.pool.allocate(2, Holder.TRANSFER)
        bench.prompts[key(name)] = ([ord(name)] * 5, limited(15))
        bench.arrive(name, blocks)
    gone: list[RequestKey] = []
    ended: list[RequestKey] = []
    while len(ended) < 3:
        before = {each.key for each in bench.scheduler._places.running}
        ended += bench.step()
        bench.check()
        after = {each.key for each in bench.scheduler._places.running}
        gone += sorted(before - after - set(ended), key=str)
    assert gone[:2] == [key("c"), key("b")], "last in, first out"
    assert ended == [key("a"), key("b"), key("c")]
    preemptions, cached_tokens = bench.scheduler.take_counts()
    assert preemptions >= 2
    assert cached_tokens >= 0
    assert bench.scheduler.take_counts() == (0, 0)


def test_blocks_that_are_leased_are_waited_for() -> None:
    bench = Bench(num_blocks=4)
    blocks = bench.pool.allocate(2, Holder.TRANSFER)
    bench.prompts[key("a")] = ([1] * 6, limited(10))
    bench.arrive("a", blocks)
    leased = bench.pool.allocate(2, Holder.TRANSFER)
    bench.step()
    bench.step()
    assert bench.scheduler.schedule(0.0) == []
    assert bench.scheduler.lacks_blocks
    assert bench.reserve("b", [1], limited(1)) is None
    bench.prompts[key("c")] = ([2] * 5, limited(6))
    bench.arrive("c", leased)
    ended: list[RequestKey] = []
    for _ in range(30):
        ended += bench.step()
    assert ended == [key("a"), key("c")]
    assert not bench.scheduler.lacks_blocks


def test_who_was_preempted_does_not_wait_for_one_that_is_held() -> None:
    """The held one keeps most of the pool; nobody runs who would have to end first."""
    bench = Bench(num_blocks=8)
    for name in "ab":
        bench.prompts[key(name)] = ([ord(name)] * 5, limited(20))
        bench.arrive(name, bench.pool.allocate(2, Holder.TRANSFER))
    while not bench.scheduler.lacks_blocks:
        assert bench.step() == []
    bench.scheduler.hold(key("a"), is_held=True, now=0.0)
    ended: list[RequestKey] = []
    for _ in range(40):
        ended += bench.step()
        bench.check()
    assert ended == [key("b")]
    assert not bench.scheduler.lacks_blocks
    bench.scheduler.hold(key("a"), is_held=False, now=0.0)
    for _ in range(40):
        ended += bench.step()
    assert ended == [key("b"), key("a")]


@settings(max_examples=300, deadline=None)
@given(
    num_blocks=st.integers(8, 24),
    max_num_seqs=st.integers(1, 5),
    more_tokens=st.integers(0, 12),
    events=st.lists(
        st.sampled_from(
            ["reserve", "reserve", "arrive", "arrive", "lose", "step", "step", "cancel", "fail", "hold", "on"]
        ),
        max_size=120,
    ),
    data=st.data(),
)
def test_any_order_of_events(
    num_blocks: int, max_num_seqs: int, more_tokens: int, events: list[str], data: st.DataObject
) -> None:
    """Every answer is that of an undisturbed run, blocks are conserved, and at the end all get through."""
    bench = Bench(num_blocks, max_num_seqs, max_num_seqs + more_tokens)
    scheduler, places = bench.scheduler, bench.scheduler._places
    alive: list[RequestKey] = []  # in order of arrival
    slow: set[RequestKey] = set()  # of these, those that are held
    leased: dict[str, list[int]] = {}
    num_names = 0

    def step() -> None:
        held = {k for k in alive if any(k == s.key for s in (*places._running.values(), *places._ready))}
        ended = bench.step()
        still = {s.key for s in (*places._running.values(), *places._ready)}
        assert slow.isdisjoint(ended)
        gone = held - still - set(ended) - slow
        stay = held & still
        assert not gone or not stay & slow, "somebody gave way to one that is held"
        assert not gone or not stay or max(map(alive.index, stay)) < min(map(alive.index, gone)), (
            "somebody gave way to a younger one"
        )
        for each in ended:
            alive.remove(each)

    for event in events:
        match event:
            case "reserve":
                longest = num_blocks * BLOCK_SIZE
                num_tokens = data.draw(st.integers(1, min(20, longest - 1)))
                max_tokens = data.draw(st.integers(2, 30)) if num_tokens + 2 <= longest else 2
                max_tokens = min(max_tokens, longest - num_tokens)
                first = data.draw(st.integers(0, 2))  # prompts that begin alike
                wanted = limited(max_tokens, data.draw(st.sampled_from([0.0, 1.0])))
                prompt = [first] * num_tokens
                if len(fake_answer(prompt, wanted)) == 1:
                    continue
                num_names += 1
                if (blocks := bench.reserve(num_names, prompt, wanted)) is not None:
                    leased[str(num_names)] = blocks
            case "arrive" if leased:
                name = data.draw(st.sampled_from(sorted(leased)))
                bench.arrive(name, leased.pop(name))
                alive.append(key(name))
            case "lose" if leased:
                bench.pool.drop(leased.pop(data.draw(st.sampled_from(sorted(leased)))), Holder.TRANSFER)
            case "step":
                step()
            case "cancel" if alive:
                gone = data.draw(st.sampled_from(alive))
                assert scheduler.cancel(gone)
                assert not scheduler.cancel(gone)
                alive.remove(gone)
                slow.discard(gone)
            case "hold" if alive:
                slow.add(each := data.draw(st.sampled_from(alive)))
                scheduler.hold(each, is_held=True, now=0.0)
            case "on" if slow:
                slow.remove(each := data.draw(st.sampled_from(sorted(slow, key=str))))
                scheduler.hold(each, is_held=False, now=0.0)
            case "fail":
                chunks = scheduler.schedule(0.0)
                failed = scheduler.abandon()
                assert len(failed) == len(chunks)
                for each in failed:
                    alive.remove(each)
        bench.check()
        assert scheduler.num_waiting + scheduler.num_running == len(alive)
        assert sum(map(len, leased.values())) == bench.pool.num_references(Holder.TRANSFER)

    for name in sorted(leased):
        bench.arrive(name, leased[name])
        alive.append(key(name))
    for _ in range(3000):
        if not set(alive) - slow:
            break
        step()
    assert set(alive) == slow, "nobody moves, or somebody waits for ever"
    for each in slow:
        scheduler.hold(each, is_held=False, now=0.0)
    slow.clear()
    for _ in range(3000):
        if not alive:
            break
        step()
    assert not alive, "nobody moves, or somebody waits for ever"
    assert bench.pool.counts().available == num_blocks
