"""Prompts that a decode worker reads beside its decoding: by example, and in any order of events."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from decode_worker.chunk_budget import MIN_CHUNK_TOKENS
from engine.block_pool import Holder
from engine.fake import fake_answer
from engine.latency import LatencyModel, StepShape
from engine.sequence import RequestKey, ScheduledChunk
from engine.urgency import FAIR_STEPS, Urgency
from tests.decode_worker.scheduler_bench import Bench, key, limited

MODEL = LatencyModel({"step": 0.010, "rows": 0.001})
"""10 ms a step, and 1 ms a token."""


def sizes(chunks: list[ScheduledChunk]) -> list[int]:
    return [len(chunk.token_ids) for chunk in chunks]


def run(bench: Bench, steps: int = 200) -> list[RequestKey]:
    ended: list[RequestKey] = []
    for _ in range(steps):
        ended += bench.step()
        bench.check()
    return ended


def test_a_prompt_is_read_in_chunks_beside_who_decodes() -> None:
    bench = Bench(max_batch_tokens=8)
    bench.add("writes", 6, 20)
    assert bench.read("reads", list(range(19)), limited(4))
    assert bench.scheduler.queue_tokens == 19
    batches = []
    while not bench.answers[key("reads")]:
        bench.step()
        batches.append(sizes(bench.chunks))
    assert batches == [[1, 7], [1, 7], [1, 5]], "everybody who decodes is in every step"
    assert len(bench.answers[key("writes")]) == 4
    assert bench.scheduler.queue_tokens == 0
    assert run(bench) == [key("reads"), key("writes")]
    assert bench.pool.counts().available == 64


def test_the_first_token_says_how_long_it_took_and_what_was_cached() -> None:
    bench = Bench(max_batch_tokens=8)
    prompt = list(range(12))
    bench.read("a", prompt, limited(2), now=1.0)
    assert (bench.scheduler.num_waiting, bench.scheduler.num_running) == (1, 0)
    bench.step(3.0, 4.0)
    assert bench.scheduler.shape == StepShape()
    assert (bench.scheduler.num_waiting, bench.scheduler.num_running) == (0, 1)
    assert not bench.reads
    bench.step(4.0, 5.5)
    read = bench.reads[key("a")]
    assert (read.queue_s, read.read_s, read.cached_tokens) == (2.0, 2.5, 0)
    assert bench.scheduler.decoding == (1, 13)
    assert bench.step(6.0) == [key("a")]
    assert bench.queue_s == {}, "it came by no hand-off"


def test_an_answer_may_end_with_the_token_that_its_prompt_draws() -> None:
    bench = Bench()
    bench.read("a", [1, 2, 3], limited(1))
    assert bench.step() == [key("a")]
    assert bench.pool.counts().available == 64


def test_what_was_read_meanwhile_is_not_read_again() -> None:
    """Two prompts that begin alike come at once: the second finds what the first has read."""
    bench = Bench(max_num_seqs=4)
    common = list(range(50, 66))
    bench.read("a", common, limited(5))
    bench.read("b", [*common, 1, 2, 3], limited(5))
    bench.step()
    bench.step()
    assert bench.reads[key("b")].cached_tokens == 16
    assert sizes(bench.chunks) == [1, 3]
    assert bench.scheduler.take_counts() == (0, 16)
    assert sorted(run(bench), key=str) == [key("a"), key("b")]


def test_prompts_whose_log_probabilities_are_asked_for_are_read_whole() -> None:
    """Bench.step compares them; the pool is so small that they are preempted, too."""
    bench = Bench(num_blocks=13, max_num_seqs=3, max_batch_tokens=3)
    bench.add("writes", 4, 40)
    wanted = limited(6, prompt_logprobs=2)
    bench.read("a", list(range(16)), wanted)
    bench.read("b", list(range(12)), wanted)
    gone: set[RequestKey] = set()
    for _ in range(100):
        bench.step()
        gone |= {each.key for each in bench.scheduler._places._preempted if each.reading is not None}
    assert gone, "no prompt was preempted while it was read"
    assert bench.reads.keys() == {key("a"), key("b")}
    assert bench.pool.counts().available == 13


def test_without_limits_prompts_are_read_as_they_come() -> None:
    bench = Bench(max_num_seqs=4, max_batch_tokens=8, model=MODEL)
    for name, length in (("long", 30), ("short", 3), ("last", 3)):
        bench.read(name, list(range(length)), limited(9))
    order: list[RequestKey] = []
    for _ in range(10):
        bench.step()
        order += [each for each in bench.reads if each not in order]
    assert order == [key("long"), key("short"), key("last")]


@pytest.mark.parametrize(
    ("told", "order"),
    [
        ({"a": Urgency(9.0), "b": Urgency(8.0), "c": Urgency(7.0)}, "cba"),
        ({"a": Urgency(9.0), "b": Urgency(8.0), "c": Urgency(10.0, priority=1)}, "cba"),
        # 30 tokens take more than 35 ms: it is late, and those that are not go first.
        ({"a": Urgency(0.035), "b": Urgency(8.0), "c": Urgency(7.0)}, "cba"),
        # Its answer has begun elsewhere: it has no deadline, for it was due when it came.
        ({"a": Urgency(9.0), "b": Urgency(8.0), "c": Urgency(None)}, "cba"),
    ],
)
def test_with_limits_the_most_urgent_prompt_is_read_first(told: dict[str, Urgency], order: str) -> None:
    bench = Bench(max_num_seqs=4, max_batch_tokens=8, model=MODEL)
    for name, urgency in told.items():
        bench.read(name, [ord(name)] * 30, limited(9), urgency=urgency)
    read: list[RequestKey] = []
    for step in range(30):
        bench.step(step * 0.018)
        read += [each for each in bench.reads if each not in read]
    assert read == [key(name) for name in order]


def test_a_late_prompt_is_read_though_urgent_ones_keep_coming() -> None:
    bench = Bench(num_blocks=400, max_num_seqs=8, max_batch_tokens=8, model=MODEL)
    bench.read("late", [1] * 24, limited(2), urgency=Urgency(-1.0))
    steps = 0
    while key("late") not in bench.reads:
        while bench.scheduler.queue_tokens < 24 + 16:
            bench.read(
                f"next{steps}-{bench.scheduler.queue_tokens}", [2] * 8, limited(1), urgency=Urgency(1e9)
            )
        bench.step(steps * 0.018)
        steps += 1
    assert 3 * FAIR_STEPS - 1 <= steps <= 3 * FAIR_STEPS
    assert bench.reads[key("late")].read_s > 0


def test_chunks_are_what_those_who_decode_can_afford() -> None:
    """10 ms a step and 1 ms a token: with 20.5 ms for each token there is room for nine of a prompt."""
    bench = Bench(num_blocks=200, max_num_seqs=4, max_batch_tokens=64, model=MODEL)
    bench.add("writes", 6, 100, urgency=Urgency(None, tpot_s=0.0205))
    bench.read("reads", [3] * 100, limited(9), urgency=Urgency(9.0))
    now, batches = 0.0, []
    while key("reads") not in bench.reads:
        bench.step(now)
        now += MODEL.step_s(StepShape(decode_batch=sum(sizes(bench.chunks))))
        batches.append(sizes(bench.chunks))
    assert batches[0] == [1, 9]
    assert all(batch[0] == 1 and len(batch) == 2 for batch in batches)
    assert now / len(batches) <= 0.0207
    assert len(batches) <= 12, "no more steps than the limit asks for"


def test_where_chunks_are_costly_answers_keep_their_limit_and_prompts_get_on() -> None:
    """15 ms for any chunk: a token in each step would make each take 21 ms, and a hundred steps."""
    model = LatencyModel({"step": 0.004, "rows": 0.001, "prefill_chunks": 0.015})
    bench = Bench(num_blocks=200, max_num_seqs=4, max_batch_tokens=64, model=model)
    bench.add("writes", 6, 100, urgency=Urgency(None, tpot_s=0.0205))
    bench.read("reads", [3] * 100, limited(9), urgency=Urgency(9.0))
    now, steps, shapes = 0.0, 0, []
    while key("reads") not in bench.reads:
        bench.step(now)
        shapes.append(sizes(bench.chunks))
        chunk = sum(shapes[-1][1:])
        now += 0.005 + (0.015 + 0.001 * chunk if chunk else 0.0)
        steps += 1
    assert now / steps <= 0.0205
    assert steps < 40
    assert min(shape[1] for shape in shapes[:-1] if len(shape) > 1) >= 15


def test_who_is_ahead_spends_a_quarter_of_it() -> None:
    bench = Bench(num_blocks=200, max_num_seqs=4, max_batch_tokens=64, model=MODEL)
    bench.add("writes", 6, 100, urgency=Urgency(None, tpot_s=0.0205))
    for step in range(10):
        bench.step(step * 0.011)
    # 10 tokens in 110 ms instead of 205: a quarter of 95 ms, and 20.5 for the next one.
    bench.read("reads", [3] * 100, limited(9), urgency=Urgency(9.0))
    bench.step(0.110)
    assert sizes(bench.chunks) == [1, pytest.approx(33, abs=2)]
    assert bench.scheduler.least_tpot_s == pytest.approx(0.0205)
    # That step has taken as long as it was allowed to; three quarters are left for the next ones.
    assert bench.scheduler.ahead_s == pytest.approx(0.75 * 0.095, abs=0.001)


def test_who_can_afford_nothing_lets_a_few_tokens_pass() -> None:
    bench = Bench(num_blocks=200, max_num_seqs=4, max_batch_tokens=64, model=MODEL)
    bench.add("writes", 6, 100, urgency=Urgency(None, tpot_s=0.0112))
    bench.read("reads", [3] * 100, limited(9), urgency=Urgency(9.0))
    bench.step()
    assert sizes(bench.chunks) == [1, MIN_CHUNK_TOKENS]


def test_a_limit_of_who_is_held_does_not_count_and_is_forgiven() -> None:
    bench = Bench(num_blocks=200, max_num_seqs=4, max_batch_tokens=64, model=MODEL)
    bench.add("slow", 6, 100, urgency=Urgency(None, tpot_s=0.020))
    bench.step(0.0, 0.011)
    bench.scheduler.hold(key("slow"), is_held=True, now=0.011)
    bench.read("reads", [3] * 100, limited(9), urgency=Urgency(9.0))
    bench.step(0.011, 0.085)
    assert sizes(bench.chunks) == [64]
    assert (bench.scheduler.least_tpot_s, bench.scheduler.ahead_s) == (None, 0.0)
    bench.scheduler.hold(key("slow"), is_held=False, now=5.0)
    bench.step(5.0, 5.02)
    assert bench.scheduler.least_tpot_s == pytest.approx(0.020)
    assert sizes(bench.chunks)[1] > MIN_CHUNK_TOKENS


def test_what_is_held_after_it_was_preempted_while_it_was_read() -> None:
    bench = Bench(num_blocks=8, max_num_seqs=2, max_batch_tokens=2)
    bench.add("old", 4, 28)
    assert bench.read("young", list(range(14)), limited(10))
    ended: list[RequestKey] = []
    while not bench.scheduler.lacks_blocks:
        ended += bench.step()
        bench.check()
    assert bench.scheduler.queue_tokens == 14
    bench.scheduler.hold(key("young"), is_held=True, now=0.0)
    assert not bench.scheduler.lacks_blocks
    assert run(bench) == [key("old")]
    bench.scheduler.hold(key("young"), is_held=False, now=0.0)
    assert run(bench) == [key("young")]


class MixedMachine(RuleBasedStateMachine):
    """Every answer is that of an undisturbed run, nobody who decodes waits for a prompt, blocks are
    conserved, and at the end all get through."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(num_blocks=20, max_num_seqs=4, max_batch_tokens=9, model=MODEL)
        self.alive: set[RequestKey] = set()
        self.slow: set[RequestKey] = set()
        self.leased: dict[int, list[int]] = {}
        self.names = 0
        self.now = 0.0

    def some(self, data: st.DataObject, keys: set[RequestKey]) -> RequestKey:
        return data.draw(st.sampled_from(sorted(keys, key=str)))

    def urgency(self, data: st.DataObject) -> Urgency | None:
        if not data.draw(st.booleans()):
            return None
        left_s = data.draw(st.one_of(st.none(), st.floats(-0.1, 0.3)))
        deadline_s = None if left_s is None else self.now + left_s
        tpot_s = data.draw(st.sampled_from([0.005, 0.013, 0.02, float("inf")]))
        return Urgency(deadline_s, tpot_s, data.draw(st.sampled_from([0, 0, 1])))

    def prompt(self, data: st.DataObject) -> list[int]:
        """Prompts begin alike."""
        first = data.draw(st.integers(0, 1))
        return [first] * data.draw(st.integers(1, 24)) + [first + 1] * data.draw(st.integers(0, 3))

    @rule(data=st.data(), max_tokens=st.integers(1, 20), scored=st.sampled_from([None, None, 1]))
    def read(self, data: st.DataObject, max_tokens: int, scored: int | None) -> None:
        wanted = limited(max_tokens, data.draw(st.sampled_from([0.0, 1.0])), scored)
        self.names += 1
        if self.bench.read(self.names, self.prompt(data), wanted, self.now, self.urgency(data)):
            self.alive.add(key(self.names))

    @rule(data=st.data(), max_tokens=st.integers(2, 20))
    def reserve(self, data: st.DataObject, max_tokens: int) -> None:
        prompt, wanted = self.prompt(data), limited(max_tokens)
        if len(fake_answer(prompt, wanted)) == 1:
            return
        self.names += 1
        if (blocks := self.bench.reserve(self.names, prompt, wanted)) is not None:
            self.leased[self.names] = blocks

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.leased)))
        self.bench.arrive(name, self.leased.pop(name), self.now, self.urgency(data))
        self.alive.add(key(name))

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        blocks = self.leased.pop(data.draw(st.sampled_from(sorted(self.leased))))
        self.bench.pool.drop(blocks, Holder.TRANSFER)

    @rule()
    def step(self) -> None:
        scheduler = self.bench.scheduler
        before = {
            each.key: len(self.bench.answers[each.key]) for each in scheduler._places.running if each.decodes
        }
        ended = self.bench.step(self.now)
        self.now += MODEL.step_s(StepShape(decode_batch=sum(sizes(self.bench.chunks))))
        waited = [
            each
            for each in scheduler._places.running
            if len(self.bench.answers[each.key]) == before.get(each.key)
        ]
        assert len(waited) <= scheduler._num_paused, "somebody who decodes waited, and not for blocks"
        assert self.slow.isdisjoint(ended)
        self.alive -= set(ended)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        gone = self.some(data, self.alive)
        assert self.bench.scheduler.cancel(gone)
        assert not self.bench.scheduler.cancel(gone)
        self.alive.discard(gone)
        self.slow.discard(gone)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        self.slow.add(each := self.some(data, self.alive))
        self.bench.scheduler.hold(each, is_held=True, now=self.now)

    @precondition(lambda self: self.slow)
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        self.slow.remove(each := self.some(data, self.slow))
        self.bench.scheduler.hold(each, is_held=False, now=self.now)

    @rule()
    def fail(self) -> None:
        chunks = self.bench.scheduler.schedule(self.now)
        failed = self.bench.scheduler.abandon()
        assert len(failed) == len(chunks)
        self.alive -= set(failed)

    @invariant()
    def books_agree(self) -> None:
        scheduler = self.bench.scheduler
        self.bench.check()
        assert scheduler.num_waiting + scheduler.num_running == len(self.alive)
        assert sum(map(len, self.leased.values())) == self.bench.pool.num_references(Holder.TRANSFER)
        unread = [len(self.bench.prompts[each][0]) for each in self.alive if not self.bench.answers[each]]
        assert scheduler.queue_tokens <= sum(unread)
        assert bool(scheduler.queue_tokens) == bool(unread)

    def teardown(self) -> None:
        """All that are here end, those that are held as soon as they may."""
        for name in sorted(self.leased):
            self.bench.arrive(name, self.leased[name], self.now)
            self.alive.add(key(name))
        self.leased.clear()
        for _ in range(2):
            for _ in range(600):
                if not self.alive - self.slow:
                    break
                self.step()
                self.books_agree()
            assert self.alive == self.slow, "nobody moves, or somebody waits for ever"
            for each in self.slow:
                self.bench.scheduler.hold(each, is_held=False, now=self.now)
            self.slow.clear()
        assert not self.alive
        assert self.bench.pool.counts().available == 20


TestMixed = MixedMachine.TestCase
TestMixed.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
