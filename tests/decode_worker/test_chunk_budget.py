"""How many prompt tokens a step takes: the largest number that fits, and who is heard."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_worker.chunk_budget import (
    CATCH_UP_TOKENS,
    MIN_CHUNK_TOKENS,
    MOST_SAVED,
    SPEND_TOKENS,
    ChunkBudget,
    Pace,
)
from engine.latency import LatencyModel, OnlineLatency, StepShape

MODEL = LatencyModel(
    {"step": 0.004, "rows": 0.001, "rows_from_16": 0.0005, "prefill_attention": 1e-6, "decode_context": 1e-6}
)


def budget(model: LatencyModel = MODEL, max_batch_tokens: int = 64) -> ChunkBudget:
    return ChunkBudget(OnlineLatency(model), max_batch_tokens)


def pace(
    tpot_s: float = 0.02, elapsed_s: float = 0.2, num_drawn: int = 10, most_left: int = 50, context: int = 100
) -> Pace:
    return Pace(tpot_s, elapsed_s, num_drawn, most_left, context)


def first(chunks: list[tuple[int, int]], count: int) -> tuple[tuple[int, int], ...]:
    """The chunks that the first `count` tokens make, worked out token by token."""
    taken = [0] * len(chunks)
    for at in [at for at, (left, _) in enumerate(chunks) for _ in range(left)][:count]:
        taken[at] += 1
    return tuple((new, before) for new, (_, before) in zip(taken, chunks, strict=True) if new)


@given(
    st.integers(0, 20),
    st.floats(-0.1, 0.2),
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 500)), min_size=1, max_size=4),
)
def test_it_is_the_largest_number_with_which_the_step_keeps_the_limit(
    batch: int, limit_s: float, chunks: list[tuple[int, int]]
) -> None:
    context = batch * 30
    most = min(64 - batch, sum(left for left, _ in chunks))
    fitting = [
        count
        for count in range(1, most + 1)
        if MODEL.step_s(StepShape(first(chunks, count), batch, context)) <= limit_s
    ]
    expected = min(most, max([MIN_CHUNK_TOKENS, *fitting]))
    assert budget().num_tokens(batch, context, limit_s, chunks) == expected


# Twenty tokens of a prompt cost as much as that there are any.
COSTLY = LatencyModel({"step": 0.004, "rows": 0.001, "prefill_chunks": 0.02})


def test_what_is_not_worth_a_chunk_is_saved_up() -> None:
    one = budget(COSTLY)
    counts = [one.num_tokens(4, 100, 0.010, [(100, 0)]) for _ in range(2 * MOST_SAVED)]
    assert counts == ([0] * (MOST_SAVED - 1) + [20]) * 2, "nobody can afford any, and prompts get on"
    nineteen_s = 0.0471
    assert [one.num_tokens(4, 100, nineteen_s, [(100, 0)]) for _ in range(4)] == [0, 38, 0, 38], "two steps'"
    assert one.num_tokens(4, 100, 0.0491, [(100, 0)]) == 21
    assert one.num_tokens(4, 100, 0.049, [(3, 0)]) == 3, "all that there is"
    assert one.num_tokens(4, 100, None, [(100, 0)]) == 60
    assert one.num_tokens(0, 0, 0.001, [(100, 0)]) == MIN_CHUNK_TOKENS, "nobody gains by waiting"


def test_a_step_without_a_chunk_counts_only_until_there_is_one() -> None:
    one = budget(COSTLY)
    for _ in range(3):
        counts = [one.num_tokens(4, 100, 0.010, [(100, 0)]) for _ in range(MOST_SAVED - 1)]
        assert counts == [0] * (MOST_SAVED - 1)
        assert one.num_tokens(4, 100, 0.060, [(100, 0)]) > 20


@pytest.mark.parametrize(("model", "limit_s"), [(MODEL, None), (LatencyModel.unknown(), 0.001)])
def test_without_a_limit_or_a_model_it_is_what_the_batch_leaves(
    model: LatencyModel, limit_s: float | None
) -> None:
    assert budget(model).num_tokens(10, 300, limit_s, [(100, 0)]) == 54
    assert budget(model).num_tokens(10, 300, limit_s, [(20, 0), (7, 0)]) == 27


def test_a_promise_is_kept_not_an_expectation() -> None:
    latency = OnlineLatency(MODEL)
    before = ChunkBudget(latency, 64).num_tokens(4, 100, 0.04, [(100, 0)])
    for _ in range(50):
        latency.observe(StepShape((), 4, 100), 2 * MODEL.step_s(StepShape((), 4, 100)))
    assert ChunkBudget(latency, 64).num_tokens(4, 100, 0.04, [(100, 0)]) < before / 1.5


def test_what_the_next_token_may_take() -> None:
    assert pace().effective_s == pytest.approx(0.02)
    assert pace(elapsed_s=0.1).effective_s == pytest.approx(0.02 + 0.1 / SPEND_TOKENS)
    assert pace(elapsed_s=0.3).effective_s == pytest.approx(0.02 - 0.1 / 10), "as many as have come"
    assert pace(elapsed_s=0.3, most_left=5).effective_s == pytest.approx(0.02 - 0.1 / 5), "no more may come"
    assert pace(elapsed_s=0.01, num_drawn=0).effective_s == pytest.approx(0.02 - 0.01 / CATCH_UP_TOKENS)


@given(st.floats(0.001, 1.0), st.floats(0, 10), st.integers(0, 100), st.integers(1, 100))
def test_who_is_given_what_it_can_afford_ends_in_time(
    tpot_s: float, elapsed_s: float, num_drawn: int, most_left: int
) -> None:
    """If each token to come takes just that, the average is within the limit when no more may come, or at
    once, if it is within the limit now."""
    now = Pace(tpot_s, elapsed_s, num_drawn, most_left, 10)
    tokens = 1 if now.ahead_s >= 0 else most_left
    end_s = elapsed_s + tokens * now.effective_s
    assert end_s <= tpot_s * (num_drawn + tokens) * (1 + 1e-9) + 1e-9


def test_what_can_be_sustained_does_not_count_what_one_is_ahead() -> None:
    assert pace(elapsed_s=0.1).sustained_s == pytest.approx(0.02)
    assert pace(elapsed_s=0.3).sustained_s == pytest.approx(0.01)
    assert 0 < pace(elapsed_s=3.0).sustained_s < 0.001


def test_the_tightest_is_heard_unless_its_case_is_lost() -> None:
    easy, tight = pace(), pace(elapsed_s=0.25)
    # 50 tokens more at about 5 ms each would have to come in 10 ms.
    lost = pace(elapsed_s=1.19)
    assert budget().tightest([easy, tight]) is tight
    assert budget().tightest([lost, easy, tight]) is tight
    assert budget().tightest([lost]) is None
    assert budget().tightest([]) is None
    assert budget(LatencyModel.unknown()).tightest([lost, easy]) is lost, "nothing says that it is lost"
