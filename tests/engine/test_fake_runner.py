"""The fake must be as unforgiving as a model: right answers from right blocks only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidStepError
from engine.fake import FAKE_VOCAB_SIZE, FakeRunner, fake_answer, fake_logprobs
from engine.sequence import ScheduledChunk, TokenHistory, TokenSampling

GREEDY = TokenSampling(
    temperature=0, top_k=0, top_p=1.0, seed=5, max_tokens=20, min_tokens=0, stop_token_ids=frozenset()
)
BLOCK_SIZE = 4
BLOCK_NBYTES = 96
NUM_BLOCKS = 16


def new_memory() -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.full((NUM_BLOCKS, BLOCK_NBYTES), 0xA5, dtype=np.uint8)


def drawn(runner: FakeRunner, *chunks: ScheduledChunk) -> list[int | None]:
    return [result.token_id for result in runner.step(chunks)]


def run(
    runner: FakeRunner, prompt: Sequence[int], table: Sequence[int], sampling: TokenSampling, chunk: int
) -> list[int]:
    answer: list[int] = []
    history = TokenHistory(prompt)
    start, new = 0, list(prompt)
    while True:
        now, new = new[:chunk], new[chunk:]
        last = None if new else sampling
        (result,) = runner.step([ScheduledChunk(now, start, table, last, len(answer), history)])
        token = result.token_id
        start += len(now)
        if token is not None:
            answer.append(token)
            history.append(token)
            new = [token]
            if sampling.stop_reason(token, len(answer)):
                return answer


@given(
    prompt=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=30),
    table=st.permutations(range(NUM_BLOCKS)),
    chunk=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 1.0]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
)
def test_answers_do_not_depend_on_chunks_or_blocks(
    prompt: list[int], table: list[int], chunk: int, temperature: float, presence_penalty: float
) -> None:
    sampling = replace(GREEDY, temperature=temperature, presence_penalty=presence_penalty)
    answer = run(FakeRunner(new_memory(), BLOCK_SIZE), prompt, table, sampling, chunk)
    assert answer == fake_answer(prompt, sampling)
    assert len(answer) == 20
    assert all(0 <= token < FAKE_VOCAB_SIZE for token in answer)


@given(
    position=st.integers(0, 9), byte=st.integers(0, BLOCK_NBYTES // BLOCK_SIZE - 1), mask=st.integers(1, 255)
)
def test_any_corrupted_byte_changes_the_next_token(position: int, byte: int, mask: int) -> None:
    memory, table = new_memory(), [3, 0, 2]
    runner = FakeRunner(memory, BLOCK_SIZE)
    prompt = list(range(10))
    right = fake_answer(prompt, replace(GREEDY, max_tokens=3))
    assert drawn(runner, ScheduledChunk(prompt, 0, table, GREEDY, 0)) == right[:1]
    slot_nbytes = BLOCK_NBYTES // BLOCK_SIZE
    memory[table[position // BLOCK_SIZE], position % BLOCK_SIZE * slot_nbytes + byte] ^= mask
    # Two tokens: one alone is right by chance once in FAKE_VOCAB_SIZE times.
    chunks = [ScheduledChunk([right[at]], 10 + at, table, GREEDY, at + 1) for at in range(2)]
    assert [drawn(runner, chunk)[0] for chunk in chunks] != right[1:]


def test_swapped_or_stale_blocks_change_the_next_token() -> None:
    memory = new_memory()
    runner = FakeRunner(memory, BLOCK_SIZE)
    prompt = list(range(10))
    right = fake_answer(prompt, replace(GREEDY, max_tokens=2))
    runner.step(
        [ScheduledChunk(prompt, 0, [0, 1, 2], None, 0), ScheduledChunk([7] * 10, 0, [3, 4, 5], None, 0)]
    )
    for table in ([1, 0, 2], [0, 4, 2], [0, 9, 2]):
        assert drawn(runner, ScheduledChunk(right[:1], 10, table, GREEDY, 1)) != right[1:]
    assert drawn(runner, ScheduledChunk(right[:1], 10, [0, 1, 2], GREEDY, 1)) == right[1:]


def test_blocks_copied_to_other_places_carry_the_answer_on() -> None:
    here, there = new_memory(), new_memory()
    prompt = list(range(11))
    right = fake_answer(prompt, replace(GREEDY, max_tokens=2))
    FakeRunner(here, BLOCK_SIZE).step([ScheduledChunk(prompt, 0, [5, 6, 7], GREEDY, 0)])
    there[[9, 1, 4]] = here[[5, 6, 7]]
    carried_on = ScheduledChunk(right[:1], 11, [9, 1, 4], GREEDY, 1)
    assert drawn(FakeRunner(there, BLOCK_SIZE), carried_on) == right[1:]


def test_stop_tokens_end_the_answer_but_not_before_min_tokens() -> None:
    undisturbed = fake_answer([1, 2, 3], GREEDY)
    stopping = replace(GREEDY, stop_token_ids=frozenset(undisturbed[4:6]))
    assert fake_answer([1, 2, 3], stopping) == undisturbed[:5]
    patient = fake_answer([1, 2, 3], replace(stopping, min_tokens=5))
    assert patient[:4] == undisturbed[:4]
    assert patient[4] not in stopping.stop_token_ids
    runner = FakeRunner(new_memory(), BLOCK_SIZE)
    assert run(runner, [1, 2, 3], range(8), replace(stopping, min_tokens=5), 2) == patient


@pytest.mark.parametrize(
    "wrong", [TokenHistory([1, 2]), TokenHistory([1, 2, 3], [4]), TokenHistory([1, 2, 4])]
)
def test_with_penalties_a_wrong_history_changes_the_answer(wrong: TokenHistory) -> None:
    sampling = replace(GREEDY, repetition_penalty=1.1)
    right = fake_answer([1, 2, 3], sampling)
    for history, is_right in ((TokenHistory([3, 2, 1]), True), (wrong, False)):
        chunk = ScheduledChunk([1, 2, 3], 0, [0], sampling, 0, history)
        assert (drawn(FakeRunner(new_memory(), BLOCK_SIZE), chunk) == right[:1]) is is_right
    with pytest.raises(InvalidStepError, match="needs the sequence's history"):
        ScheduledChunk([1, 2, 3], 0, [0], sampling, 0)


@pytest.mark.parametrize("cut", [1, 2, 5, 9])
def test_log_probabilities_depend_on_all_tokens_before_and_on_no_chunk(cut: int) -> None:
    memory = new_memory()
    runner = FakeRunner(memory, BLOCK_SIZE)
    sampling = replace(GREEDY, logprobs=3, prompt_logprobs=1)
    prompt = list(range(10))
    (first,) = runner.step([ScheduledChunk(prompt[:cut], 0, [2, 0, 1], None, 0, None, 1, prompt[cut])])
    (last,) = runner.step([ScheduledChunk(prompt[cut:], cut, [2, 0, 1], sampling, 0, None, 1)])
    expected = tuple(fake_logprobs(prompt, index, 1) for index in range(1, 10))
    assert first.prompt_logprobs + last.prompt_logprobs == expected
    assert len(first.prompt_logprobs) == cut
    assert last.token_id is not None
    assert first.logprobs is None
    assert last.logprobs == fake_logprobs([*prompt, last.token_id], 10, 3)
    assert len(last.logprobs.top) == 3
    for scored in (*expected, last.logprobs):
        assert sorted(scored.top, key=lambda one: -one[1]) == list(scored.top)
        if scored.rank <= len(scored.top):
            assert scored.top[scored.rank - 1] == (scored.token_id, scored.logprob)
    memory[2, 0] ^= 1
    (spoilt,) = runner.step([ScheduledChunk(prompt[cut:], cut, [2, 0, 1], sampling, 0, None, 1)])
    assert (spoilt.prompt_logprobs, spoilt.logprobs) != (last.prompt_logprobs, last.logprobs)


def test_the_seed_matters_only_when_sampling() -> None:
    assert fake_answer([1], replace(GREEDY, seed=6)) == fake_answer([1], GREEDY)
    warm = replace(GREEDY, temperature=0.5)
    assert fake_answer([1], replace(warm, seed=6)) != fake_answer([1], warm)


def test_before_step_sees_the_chunks_and_can_fail_the_step_before_it_writes() -> None:
    memory = new_memory()
    untouched = memory.copy()
    chunks = [ScheduledChunk([1], 0, [0], GREEDY, 0)]

    def fail(seen: Sequence[ScheduledChunk]) -> None:
        assert seen is chunks
        raise RuntimeError("struck")

    with pytest.raises(RuntimeError, match="struck"):
        FakeRunner(memory, BLOCK_SIZE, fail).step(chunks)
    assert np.array_equal(memory, untouched)


def test_invalid_chunks_and_memory_are_refused() -> None:
    memory = new_memory()
    untouched = memory.copy()
    good, bad = ScheduledChunk([1], 0, [0], None, 0), ScheduledChunk([1], 0, [NUM_BLOCKS], None, 0)
    with pytest.raises(InvalidStepError, match="only the blocks 0 to 15"):
        FakeRunner(memory, BLOCK_SIZE).step([good, bad])
    assert np.array_equal(memory, untouched)
    with pytest.raises(ValueError, match="32-bit words"):
        FakeRunner(np.zeros((2, 10), dtype=np.uint8), BLOCK_SIZE)
