"""Which steps are measured, and that they are what they say."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.latency import StepShape
from engine.profiler import Limits, Steps, choose_steps, chunks_of, measure, num_blocks_of
from engine.sequence import ChunkResult, ScheduledChunk

LIMITS = st.builds(
    Limits, st.integers(8, 4096), st.integers(1, 128), st.integers(16, 8192), st.integers(10_000, 10**6)
)


@settings(max_examples=30)
@given(LIMITS)
def test_steps_are_within_the_limits_and_those_held_out_are_not_fitted(limits: Limits) -> None:
    steps = choose_steps(limits)
    assert steps == choose_steps(limits)
    assert not set(steps.fitted) & set(steps.held_out)
    assert steps.fitted
    for shape in (*steps.fitted, *steps.held_out):
        assert 1 <= shape.num_tokens <= limits.max_batch_tokens
        assert shape.decode_batch <= limits.max_num_seqs
        assert num_blocks_of(shape, 16) * 16 <= limits.num_tokens
        for chunk in chunks_of(shape, 16, 100):
            assert chunk.start + len(chunk.token_ids) <= limits.max_context


@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(0, 100)), max_size=4),
    st.integers(0, 9),
    st.integers(1, 200),
)
def test_a_step_has_its_shape_and_no_block_twice(
    prefill: list[tuple[int, int]], batch: int, context: int
) -> None:
    shape = StepShape(tuple(prefill), batch, batch * context + (3 if batch > 3 else 0))
    chunks = chunks_of(shape, 16, 50)
    found = [(len(chunk.token_ids), chunk.start) for chunk in chunks]
    assert tuple(found[: len(prefill)]) == shape.prefill
    assert sum(start + 1 for _, start in found[len(prefill) :]) == shape.decode_context
    assert all(new == 1 for new, _ in found[len(prefill) :])
    blocks = [block for chunk in chunks for block in chunk.block_table]
    assert len(blocks) == len(set(blocks)) <= num_blocks_of(shape, 16)
    assert all(len(chunk.block_table) * 16 >= chunk.start + len(chunk.token_ids) for chunk in chunks)


class CountingRunner:
    """Takes one second for each token, and ten times that when it is first asked."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seen: dict[int, int] = {}

    def step(self, chunks: Sequence[ScheduledChunk], on_layer: object = None) -> list[ChunkResult]:
        tokens = sum(len(chunk.token_ids) for chunk in chunks)
        first = tokens not in self.seen
        self.seen[tokens] = self.seen.get(tokens, 0) + 1
        self.now += tokens * (10 if first else 1)
        return [ChunkResult(0) for _ in chunks]


def test_every_step_is_measured_as_often_and_warming_up_does_not_count() -> None:
    runner = CountingRunner()
    shapes = [StepShape(((new, 0),)) for new in (1, 5, 9)]
    progress: list[float] = []
    samples = measure(runner, shapes, 16, 50, 3, lambda: runner.now, progress.append)
    assert [(sample.shape, sample.seconds) for sample in samples] == list(
        zip(shapes, (1.0, 5.0, 9.0), strict=True)
    )
    assert runner.seen == {1: 4, 5: 4, 9: 4}
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


def test_a_small_engine_has_steps_of_every_kind() -> None:
    steps: Steps = choose_steps(Limits(64, 4, 128, 1024))
    kinds = {(bool(shape.prefill), bool(shape.decode_batch)) for shape in (*steps.fitted, *steps.held_out)}
    assert kinds == {(True, False), (False, True), (True, True)}
