"""A latency model from the first two seconds of a worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.calibration import calibrate, calibration_steps
from engine.engine import Engine
from engine.fake import FakeRunner
from engine.generate import generate
from engine.latency import LatencyModel, StepShape
from engine.latency_fit import Sample, relative_errors
from engine.profiler import Limits, choose_steps, num_blocks_of
from engine.sequence import ChunkResult, ScheduledChunk, TokenSampling

TRUTH = LatencyModel(
    {
        "step": 0.009,
        "rows": 0.0009,
        "rows_to_8": 0.0004,
        "prefill_attention": 3e-7,
        "decode_context": 2e-6,
    }
)
"""About a core's."""
LIMITS = Limits(max_batch_tokens=512, max_num_seqs=32, max_context=2048, num_tokens=20_000)


def shape_of(chunks: Sequence[ScheduledChunk]) -> StepShape:
    """A chunk of one token after others decodes."""
    decoding = [chunk for chunk in chunks if len(chunk.token_ids) == 1 and chunk.start]
    prefill = tuple((len(c.token_ids), c.start) for c in chunks if c not in decoding)
    return StepShape(prefill, len(decoding), sum(chunk.start + 1 for chunk in decoding))


class TimedRunner:
    """Takes as long as TRUTH says, times `slowness`; ten times that whatever it has not done before, and
    twice that every third time, for others run on its core."""

    def __init__(self, slowness: float = 1.0) -> None:
        self.now = 100.0
        self.slowness = slowness
        self.seen: list[StepShape] = []

    def step(self, chunks: Sequence[ScheduledChunk], on_layer: object = None) -> list[ChunkResult]:
        shape = shape_of(chunks)
        noise = (1.0 if shape in self.seen else 10.0) * (2.0 if len(self.seen) % 3 == 2 else 1.0)
        self.seen.append(shape)
        self.now += TRUTH.step_s(shape) * self.slowness * noise
        return [ChunkResult(0) for _ in chunks]


def errors(model: LatencyModel, limits: Limits) -> np.ndarray:
    steps = choose_steps(limits)
    shapes = [shape for shape in (*steps.fitted, *steps.held_out) if sum(c for _, c in shape.prefill) < 2000]
    return relative_errors(model, [Sample(shape, TRUTH.step_s(shape)) for shape in shapes])


def test_with_time_enough_it_finds_what_steps_take_between_those_it_measures() -> None:
    runner = TimedRunner()
    model = calibrate(runner, LIMITS, 16, 1000.0, lambda: runner.now)
    found = errors(model, LIMITS)
    assert np.median(found) < 0.03
    assert found.max() < 0.25


def test_two_seconds_of_a_slow_core_tell_the_size_of_things() -> None:
    runner = TimedRunner(slowness=0.3)
    model = calibrate(runner, LIMITS, 16, 2.0, lambda: runner.now)
    assert runner.now - 100.0 < 2.5
    assert model.prefill_s(512) > 10 * model.prefill_s(16) > 10 * model.decode_s(1, 100) > 0


def test_a_model_answers_afterwards_as_before(
    random_checkpoint: Path, load_engine: Callable[..., Engine]
) -> None:
    engine = load_engine(random_checkpoint)
    limits = Limits(16, 4, 64, engine.config.num_blocks * engine.config.block_size)
    greedy = TokenSampling(0.0, 0, 1.0, 0, 20, 0, frozenset())
    before = generate(engine, [1, 2, 3], greedy)
    model = calibrate(engine.runner, limits, engine.config.block_size, 0.2, time.perf_counter)
    assert model.step_s(StepShape(((8, 0),))) > 0
    assert generate(engine, [1, 2, 3], greedy) == before


@pytest.mark.parametrize("slowness", [1e-3, 1.0, 100.0])
def test_no_step_begins_that_does_not_fit_into_the_time(slowness: float) -> None:
    runner = TimedRunner(slowness)
    calibrate(runner, LIMITS, 16, 2.0, lambda: runner.now)
    largest_s = max(TRUTH.step_s(shape) for shape in runner.seen) * slowness * 20
    assert runner.now - 100.0 < 2.0 + largest_s
    if slowness == 100.0:
        assert len(runner.seen) <= 3


def test_on_a_prefill_worker_nobody_decodes() -> None:
    runner = TimedRunner()
    limits = Limits(512, 0, 2048, 20_000)
    model = calibrate(runner, limits, 16, 1000.0, lambda: runner.now)
    assert all(shape.phase == "prefill" for shape in runner.seen[1:])
    assert model.prefill_s(300) == pytest.approx(TRUTH.prefill_s(300), rel=0.05)


@settings(max_examples=50)
@given(
    max_batch_tokens=st.integers(1, 2048),
    max_num_seqs=st.integers(0, 64),
    max_context=st.integers(2, 4096),
    block_size=st.integers(1, 64),
    num_blocks=st.integers(1, 200),
)
def test_every_step_is_one_that_the_worker_can_run(
    max_batch_tokens: int, max_num_seqs: int, max_context: int, block_size: int, num_blocks: int
) -> None:
    """And the memory that is there suffices."""
    limits = Limits(max_batch_tokens, max_num_seqs, max_context, num_blocks * block_size)
    shapes = list(calibration_steps(limits, block_size))
    assert shapes == list(calibration_steps(limits, block_size))
    sizes = [shape.num_tokens for shape in shapes]
    assert sizes == sorted(sizes)
    assert 1 <= sizes[0] <= sizes[-1] <= max_batch_tokens
    assert all(shape.decode_batch <= max_num_seqs for shape in shapes)
    assert all(num_blocks_of(shape, block_size) <= num_blocks for shape in shapes)
    runner = FakeRunner(np.zeros((num_blocks, 4 * block_size), dtype=np.uint8), block_size)
    ticks = iter(range(10**6))
    model = calibrate(runner, limits, block_size, 50.0, lambda: float(next(ticks)))
    assert model.is_known


def test_a_clock_that_stands_still_says_nothing() -> None:
    runner = FakeRunner(np.zeros((8, 64), dtype=np.uint8), 16)
    assert calibrate(runner, Limits(64, 4, 64, 128), 16, 2.0, lambda: 0.0) == LatencyModel.unknown()
