"""Simulated engines: right answers, after the time that the latency model says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.fake import fake_answer
from engine.latency import LatencyModel, StepShape
from engine.sequence import ScheduledChunk, TokenSampling
from engine.simulated import SimulatedRunner, shape_of, simulated_fingerprint, simulated_layout

GREEDY = TokenSampling(
    temperature=0, top_k=0, top_p=1.0, seed=0, max_tokens=6, min_tokens=0, stop_token_ids=frozenset()
)
LATENCY = LatencyModel({"step": 0.010, "rows": 0.001, "decode_context": 0.0001})
BLOCK_SIZE = 4


class Clock:
    """Sleeping takes as long as asked and `oversleep_s` more; each look at it takes `look_s`."""

    def __init__(self, look_s: float = 0.0, oversleep_s: float = 0.0) -> None:
        self.now = 100.0
        self.look_s, self.oversleep_s = look_s, oversleep_s
        self.sleeps: list[float] = []

    def __call__(self) -> float:
        self.now += self.look_s
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds + self.oversleep_s


def runner_with(clock: Clock) -> SimulatedRunner:
    layout = simulated_layout(BLOCK_SIZE)
    blocks = np.zeros((8, layout.block_nbytes), dtype=np.uint8)
    return SimulatedRunner(blocks, BLOCK_SIZE, layout.num_layers, LATENCY, clock, clock.sleep)


def prompt_of(num_tokens: int) -> ScheduledChunk:
    return ScheduledChunk(list(range(3, 3 + num_tokens)), 0, range(8), GREEDY, 0)


def test_answers_are_the_fakes() -> None:
    runner = runner_with(Clock())
    prompt = [5, 6, 7, 8, 9]
    answer: list[int] = []
    start, new = 0, prompt
    while len(answer) < GREEDY.max_tokens:
        (result,) = runner.step([ScheduledChunk(new, start, range(8), GREEDY, len(answer))])
        assert result.token_id is not None
        answer.append(result.token_id)
        start, new = start + len(new), [result.token_id]
    assert answer == fake_answer(prompt, GREEDY)


def test_a_step_takes_as_long_as_the_model_says() -> None:
    clock = Clock()
    runner_with(clock).step([prompt_of(5)])
    assert clock.sleeps == [pytest.approx(0.015)]


def test_what_a_step_takes_beyond_is_taken_off_the_next() -> None:
    clock = Clock(look_s=0.0005, oversleep_s=0.0002)
    runner = runner_with(clock)
    runner.step([prompt_of(5)])
    begin = clock.now
    for _ in range(10):
        runner.step([prompt_of(5)])
    # The first look of a step is not part of it; the fake's work is the second one.
    assert clock.now - begin - 10 * clock.look_s == pytest.approx(10 * 0.015)


def test_a_step_that_is_all_overhead_does_not_sleep() -> None:
    clock = Clock(look_s=1.0)
    runner = runner_with(clock)
    runner.step([prompt_of(5)])
    runner.step([prompt_of(5)])
    assert clock.sleeps == [pytest.approx(0.015)]


def test_layers_are_told_only_when_the_time_has_passed() -> None:
    clock = Clock()
    told: list[float] = []
    runner_with(clock).step([prompt_of(5)], on_layer=lambda layers: told.append(clock.now))
    assert told == [pytest.approx(100.015)]


def test_single_tokens_of_an_answer_decode_and_all_else_is_prefill() -> None:
    def chunk(num_tokens: int, start: int, num_output_tokens: int) -> ScheduledChunk:
        return ScheduledChunk([9] * num_tokens, start, range(8), GREEDY, num_output_tokens)

    # A prompt, the last token of a prompt, two that decode, and one that is computed again.
    chunks = [chunk(3, 8, 0), chunk(1, 7, 0), chunk(1, 4, 1), chunk(1, 9, 5), chunk(6, 0, 2)]
    assert shape_of(chunks) == StepShape(((3, 8), (1, 7), (6, 0)), 2, 15)


def test_a_simulation_never_passes_for_its_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first = simulated_fingerprint(tmp_path)
    assert first.startswith("simulated-")
    assert first == simulated_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert simulated_fingerprint(tmp_path) != first
