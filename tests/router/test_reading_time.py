"""Reading in chunks: the sum over its steps, and the largest chunk that a limit leaves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.latency import LatencyModel, OnlineLatency, StepShape
from router.reading_time import reading_s, slack_tokens, spending_chunk
from router.write_ledger import Batch

MODEL = LatencyModel.from_coefficients(
    {
        "step": 0.005, "rows": 2e-5, "rows_to_64": 1e-4, "rows_from_16": 2e-5, "prefill_attention": 3e-7,
        "prefill_context": 1e-7, "prefill_chunks": 2e-4, "decode_sequences": 1e-3, "decode_context": 2e-6,
    }
)  # fmt: skip


def online(scale=1.0, num_steps=200):
    """A worker whose steps take `scale` times what was measured."""
    latency = OnlineLatency(MODEL)
    for index in range(num_steps):
        shape = StepShape(((1 + 37 * index % 500, index),), index % 9, 100 * (index % 9))
        latency.observe(shape, scale * MODEL.step_s(shape) * (1.0 + 0.01 * (index % 5)))
    return latency


@given(
    tokens=st.integers(1, 3000), cached=st.integers(0, 2000), chunk=st.integers(1, 700),
    size=st.integers(0, 30), scale=st.sampled_from([0.7, 1.0, 1.6]),
)  # fmt: skip
def test_a_prompt_takes_what_its_steps_take(tokens, cached, chunk, size, scale):
    latency, batch = online(scale), Batch(size, 300 * size)
    expected, steps, done = 0.0, 0, 0
    while done < tokens:
        new = min(chunk, tokens - done)
        expected += latency.expect_s(StepShape(((new, cached + done),), batch.size, batch.context))
        steps, done = steps + 1, done + new
    seconds, num_steps = reading_s(latency, tokens, cached, chunk, batch)
    assert num_steps == steps
    assert seconds == pytest.approx(expected, rel=1e-6)


@given(
    size=st.integers(0, 40), context=st.integers(0, 500), cached=st.integers(0, 4000),
    limit_s=st.floats(0.001, 0.3), most=st.integers(0, 2048), scale=st.sampled_from([0.7, 1.6]),
)  # fmt: skip
def test_a_chunk_fills_what_the_limit_leaves(size, context, cached, limit_s, most, scale):
    latency, batch = online(scale), Batch(size, size * context)

    def promise_s(new):
        return latency.promise_s(StepShape(((new, cached),), batch.size, batch.context))

    tokens = slack_tokens(latency, batch, cached, limit_s, most)
    assert 0 <= tokens <= most
    if tokens > 0:
        assert promise_s(tokens) <= limit_s
    if tokens < most:
        assert promise_s(tokens + 2 + tokens // 16) > limit_s


def test_who_says_nothing_of_its_steps_takes_no_time():
    latency = OnlineLatency(LatencyModel.unknown())
    assert reading_s(latency, 1000, 0, 100) == (0.0, 10)
    assert slack_tokens(latency, Batch(3, 100), 0, 0.01, 512) == 512


@given(tokens=st.integers(1, 2000), chunk=st.integers(1, 300), ahead=st.floats(0, 3000))
def test_what_is_spent_is_a_share_of_what_is_left_each_step(tokens, chunk, ahead):
    left, done, steps = ahead, 0.0, 0
    while done < tokens and steps < 16:
        done, left, steps = done + chunk + left / 4, left * 3 / 4, steps + 1
    found = spending_chunk(tokens, chunk, ahead, 1 / 4)
    if done > tokens + 1e-6:
        assert -(-tokens // found) <= steps, "as few steps, or fewer by rounding"
        assert found >= -(-tokens // steps)
    elif done < tokens - 1e-6:
        assert found == chunk
