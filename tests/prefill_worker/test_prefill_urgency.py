"""Prompts of which it is known how urgent they are: order, chunks and blocks, by example and in any order."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.block_pool import BlockPool, Holder
from engine.latency import LatencyModel, OnlineLatency
from engine.prefix_cache import PrefixCache
from engine.sequence import ChunkResult, RequestKey, TokenSampling
from engine.urgency import FAIR_STEPS, Urgency
from prefill_worker.chunk_size import ChunkSizes, StepSize, Waiting
from prefill_worker.scheduler import PrefillScheduler

SAMPLING = TokenSampling(0.0, 0, 1.0, 0, 10, 0, frozenset())
MODEL = LatencyModel({"step": 1.0, "rows": 0.1})
"""A second a step, and ten tokens a second."""
SIZE = 4


class Bench:
    """A scheduler whose steps take what MODEL says. budget: most tokens of a step."""

    def __init__(self, budget: int = 1000, num_blocks: int = 1000, model: LatencyModel = MODEL) -> None:
        self.now = 0.0
        self.pool = BlockPool(num_blocks, SIZE, [0] * num_blocks)
        self.cache = PrefixCache(self.pool, "model")
        self.scheduler = PrefillScheduler(self.pool, self.cache, budget, OnlineLatency(model))
        self.model = model

    def add(self, name: str, num_tokens: int, urgency: Urgency | None, first_token: int = 0) -> None:
        token_ids = [first_token, *range(1, num_tokens)]
        self.scheduler.add(RequestKey(name, 0), token_ids, 0, SAMPLING, "", urgency, self.now)

    def step(self) -> list[str]:
        """Who is done after it."""
        chunks = self.scheduler.schedule(self.now)
        self.now += self.model.prefill_s(sum(len(chunk.token_ids) for chunk in chunks)) if chunks else 0.0
        results = [ChunkResult(None if chunk.sampling is None else 3) for chunk in chunks]
        done = self.scheduler.complete(results, self.now)
        for each in done:
            self.pool.drop(each.blocks, Holder.SEQUENCE)
        return [each.key.request_id for each in done]

    def run(self) -> list[str]:
        done: list[str] = []
        while self.scheduler.num_running + self.scheduler.num_waiting:
            done += self.step()
        return done


def due(deadline_s: float, priority: int = 0) -> Urgency:
    return Urgency(deadline_s, priority=priority)


def test_the_hopeless_do_not_pull_the_others_down() -> None:
    """Each needs 21 s. First come, first served would have nobody in time from the second on."""
    bench = Bench()
    bench.add("hopeless", 400, due(30.0), 1)
    for number, deadline in enumerate((90.0, 25.0, 50.0, 70.0)):
        bench.add(str(number), 200, due(deadline), 2 + number)
    assert bench.run() == ["1", "2", "3", "0", "hopeless"]
    assert bench.now < 90 + 42


def test_late_ones_are_read_the_shortest_first() -> None:
    bench = Bench()
    for name, num_tokens in (("long", 300), ("short", 20), ("middle", 100)):
        bench.add(name, num_tokens, due(-1.0), num_tokens)
    assert bench.run() == ["short", "middle", "long"]


def test_a_prompt_is_overtaken_at_the_border_of_a_chunk_and_goes_on_where_it_was() -> None:
    bench = Bench()
    bench.add("late", 1000, due(0.0))
    assert bench.step() == []
    read = 1000 - bench.scheduler.queue_tokens
    assert 0 < read < 400, "a large part of it, and not all"
    bench.add("urgent", 50, due(bench.now + 10.0), 7)
    assert bench.step() == ["urgent"]
    assert bench.scheduler.num_running == 1
    assert 1000 - read == bench.scheduler.queue_tokens, "a part of it would save no step"
    assert bench.run() == ["late"]


def test_who_is_on_time_is_read_in_one_go_and_who_is_late_in_efficient_chunks() -> None:
    for deadline, num_steps in ((50.0, 1), (1000.0, 1), (30.0, 3)):
        bench = Bench()
        bench.add("a", 400, due(deadline))
        steps = 0
        while bench.scheduler.num_waiting + bench.scheduler.num_running:
            bench.step()
            steps += 1
        assert steps == num_steps


def test_room_in_a_step_is_for_prompts_that_end_in_it() -> None:
    bench = Bench()
    for number, num_tokens in enumerate((20, 30, 300, 10)):
        bench.add(str(number), num_tokens, due(500.0 + number), number)
    assert bench.step() == ["0", "1"]
    assert bench.scheduler.queue_tokens == 310, "nor does one that would end in it go before the third"
    assert bench.step() == ["2"]
    assert bench.step() == ["3"]


def test_what_is_cached_is_not_waited_for() -> None:
    """Its deadline would be past, were it to be computed."""
    bench = Bench()
    bench.add("before", 400, None)
    bench.run()
    bench.add("long", 400, due(bench.now + 5.0))
    bench.add("short", 30, due(bench.now + 6.0), 9)
    assert bench.run() == ["long", "short"]


def test_one_that_lacks_blocks_lets_only_those_pass_who_have_theirs() -> None:
    bench = Bench(budget=40, num_blocks=30)
    bench.add("half done", 100, due(1000.0), 1)
    bench.step()
    bench.add("large", 60, due(bench.now + 20.0), 2)
    bench.add("small", 8, due(bench.now + 500.0), 3)
    assert bench.step() == []
    assert bench.scheduler.num_running == 1, "the small one would have fitted"
    assert bench.run() == ["half done", "large", "small"]


def test_the_oldest_has_its_turn_whatever_comes() -> None:
    bench = Bench(budget=100)
    bench.add("late", 200, due(0.0), 1)
    done: list[str] = []
    for number in range(FAIR_STEPS * 12):
        bench.add(f"{number}", 70, due(bench.now + 9.0), 100 + number)  # a whole step, and no time to lose
        done += bench.step()
        if "late" in done:
            return
    pytest.fail("it waits for ever")


def test_its_turn_costs_nobody_his_deadline() -> None:
    sizes = ChunkSizes(OnlineLatency(MODEL), 1000)
    late = Waiting(due(0.0), 900, 0, MODEL.prefill_s(900))

    def others(*slacks: float) -> list[Waiting]:
        return [Waiting(due(100.0 + 6.0 + slack), 50, 0, 6.0) for slack in slacks]

    efficient = sizes.step(late, [], 100.0).first
    assert efficient == 180, "five steps cost 4 s more than one; a twentieth of 91 s is 4.55"
    assert sizes.step(late, others(11.0), 100.0) == StepSize(100, 100)
    # The second waits for the first as well.
    assert sizes.step(late, others(40.0, 17.0), 100.0) == StepSize(100, 100)
    # Who is late already, or can wait, changes nothing.
    assert sizes.step(late, others(-0.5, 90.0), 100.0).first == efficient
    assert sizes.step(late, others(0.5), 100.0).first == 32, "never less, for it has to end"


def test_room_in_a_step_is_given_as_far_as_the_first_can_wait_for_it() -> None:
    sizes = ChunkSizes(OnlineLatency(MODEL), 1000)
    efficient = sizes.step(Waiting(due(0.0), 1000, 0, 101.0), [], 100.0).first
    for deadline, together in ((117.0, 90), (1000.0, efficient)):
        assert sizes.step(Waiting(due(deadline), 20, 0, 3.0), [], 100.0).together == together
    assert sizes.step(Waiting(Urgency(None), 20, 0, 3.0), [], 100.0) == StepSize(1000, efficient)


def test_without_a_latency_model_deadlines_still_order() -> None:
    bench = Bench(model=LatencyModel.unknown())
    for name, deadline in (("b", 20.0), ("a", 10.0)):
        bench.add(name, 900, due(deadline), int(deadline))
    chunks = bench.scheduler.schedule(0.0)
    assert [(chunk.token_ids[0], len(chunk.token_ids)) for chunk in chunks] == [(10, 900)]


def test_told_nothing_of_anybody_it_serves_first_come_first_served() -> None:
    bench = Bench(budget=100)
    for name, num_tokens in (("a", 150), ("b", 20), ("c", 60)):
        bench.add(name, num_tokens, None, num_tokens)
    spans = [(len(chunk.token_ids), chunk.start) for chunk in bench.scheduler.schedule(0.0)]
    assert spans == [(100, 0)]
    bench.scheduler.complete([ChunkResult(None)], 1.0)
    spans = [(len(chunk.token_ids), chunk.start) for chunk in bench.scheduler.schedule(0.0)]
    assert spans == [(50, 100), (20, 0), (30, 0)]


class UrgencyMachine(RuleBasedStateMachine):
    """Prompts come, are cancelled and fail in any order, in a pool that is too small for all of them."""

    @initialize(
        num_blocks=st.integers(12, 30), budget=st.integers(1, 60), known=st.booleans(), step_s=st.floats(0, 3)
    )
    def create(self, num_blocks: int, budget: int, known: bool, step_s: float) -> None:
        model = LatencyModel({"step": step_s, "rows": 0.1}) if known else LatencyModel.unknown()
        self.bench = Bench(budget, num_blocks, model)
        self.budget = budget
        self.number = 0
        self.total: dict[RequestKey, int] = {}
        self.left: dict[RequestKey, int] = {}
        self.leased: list[tuple[int, ...]] = []

    @rule(
        num_tokens=st.integers(1, 48),
        told=st.booleans(),
        ttft_left_s=st.floats(-5, 50) | st.none(),
        priority=st.integers(-1, 1),
    )
    def add(self, num_tokens: int, told: bool, ttft_left_s: float | None, priority: int) -> None:
        self.number += 1
        now, key = self.bench.now, RequestKey(str(self.number), 0)
        deadline_s = None if ttft_left_s is None else now + ttft_left_s
        urgency = Urgency(deadline_s, priority=priority) if told else None
        self.total[key] = self.left[key] = num_tokens
        tokens = [self.number] * num_tokens
        self.bench.scheduler.add(key, tokens, 0, SAMPLING, "", urgency, now)

    @precondition(lambda self: self.left)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.left, key=str)))
        assert self.bench.scheduler.cancel(key)
        assert not self.bench.scheduler.cancel(key)
        del self.left[key]

    @rule(fails=st.booleans())
    def step(self, fails: bool) -> None:
        scheduler = self.bench.scheduler
        chunks = scheduler.schedule(self.bench.now)
        assert sum(len(chunk.token_ids) for chunk in chunks) <= self.budget
        keys = [RequestKey(str(chunk.token_ids[0]), 0) for chunk in chunks]
        assert len(set(keys)) == len(keys)
        for key, chunk in zip(keys, chunks, strict=True):
            assert chunk.start == self.total[key] - self.left[key]
            assert (chunk.sampling is not None) == (len(chunk.token_ids) == self.left[key])
        if not chunks:
            assert not self.left or self.leased, "nothing runs, nothing is held, and yet somebody waits"
        if fails:
            assert scheduler.abandon() == keys
            for key in keys:
                del self.left[key]
            return
        self.bench.now += sum(len(chunk.token_ids) for chunk in chunks) * 0.1 + 1.0
        results = [ChunkResult(None if chunk.sampling is None else 3) for chunk in chunks]
        for key, chunk in zip(keys, chunks, strict=True):
            self.left[key] -= len(chunk.token_ids)
        for done in scheduler.complete(results, self.bench.now):
            assert self.left.pop(done.key) == 0
            assert done.prefill_queue_s >= 0
            assert done.prefill_s > 0
            self.leased.append(done.blocks)

    @precondition(lambda self: self.leased)
    @rule()
    def free(self) -> None:
        self.bench.pool.drop(self.leased.pop(0), Holder.SEQUENCE)

    @invariant()
    def books_agree(self) -> None:
        scheduler = self.bench.scheduler
        self.bench.pool.check()
        held = sum(map(len, self.leased))
        assert self.bench.pool.num_references(Holder.SEQUENCE) == scheduler.num_blocks + held
        assert scheduler.num_waiting + scheduler.num_running == len(self.left)
        assert scheduler.queue_tokens == sum(self.left.values())

    def teardown(self) -> None:
        """Everybody who is left gets through."""
        if not hasattr(self, "left"):
            return
        for _ in range(2 * sum(self.left.values()) + 2 * len(self.left) + 1):
            self.step(fails=False)
            while self.leased:
                self.free()
        assert not self.left
        assert self.bench.pool.counts().available == self.bench.pool.num_blocks


TestUrgency = UrgencyMachine.TestCase
TestUrgency.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(
    ("coefficients", "least"),
    [({"rows": 1.0}, 1), ({"rows": 1.0, "prefill_context": 0.2}, 300), ({"step": 10.0, "rows": 1.0}, 100)],
)
def test_an_efficient_chunk_counts_what_it_costs_to_look_back(coefficients, least) -> None:
    model = LatencyModel(coefficients)
    sizes = ChunkSizes(OnlineLatency(model), 1000)
    size = sizes.step(Waiting(due(-1.0), 1000, 0, 1.0), [], 0.0).first
    assert size >= least
    cost_s = sum(model.prefill_s(min(size, 1000 - start), start) for start in range(0, 1000, size))
    assert cost_s <= 1.05 * model.prefill_s(1000)
