"""However a step is put together, each sequence gets the tokens that it would get alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.errors import InvalidStepError
from engine.generate import generate
from engine.sequence import ScheduledChunk, TokenHistory, TokenSampling

LoadEngine = Callable[..., Engine]
GREEDY = TokenSampling(
    temperature=0, top_k=0, top_p=1.0, seed=0, max_tokens=40, min_tokens=0, stop_token_ids=frozenset()
)
WARM = replace(GREEDY, temperature=0.8, top_k=50, top_p=0.95)
PENALISED = replace(WARM, frequency_penalty=0.5, repetition_penalty=1.3, min_p=0.01)


@dataclass
class Live:
    """A sequence under way: its tokens, and how many of them have been computed."""

    tokens: list[int]
    num_prompt: int
    block_table: Sequence[int]
    sampling: TokenSampling
    num_computed: int = 0

    def chunk(self, size: int) -> ScheduledChunk:
        new = self.tokens[self.num_computed : self.num_computed + size]
        complete = self.num_computed + len(new) == len(self.tokens)
        return ScheduledChunk(
            new,
            self.num_computed,
            self.block_table,
            self.sampling if complete else None,
            len(self.tokens) - self.num_prompt,
            TokenHistory(self.tokens[: self.num_prompt], self.answer),
        )

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def is_done(self) -> bool:
        return len(self.answer) == self.sampling.max_tokens


@pytest.mark.parametrize("seed", range(2))
def test_chunks_batches_and_block_tables_do_not_change_answers(
    checkpoint: Path, load_engine: LoadEngine, seed: int
) -> None:
    engine = load_engine(checkpoint)
    dice = random.Random(seed)
    blocks = dice.sample(range(64), 64)
    sequences = []
    for index in range(5):
        prompt = [dice.randrange(engine.model_config.vocab_size) for _ in range(dice.randint(1, 40))]
        sampling = replace(dice.choice([GREEDY, WARM, PENALISED]), seed=dice.getrandbits(64))
        sequences.append(Live(prompt, len(prompt), blocks[index * 10 : index * 10 + 10], sampling))
    while live := [sequence for sequence in sequences if not sequence.is_done]:
        batch = dice.sample(live, dice.randint(1, len(live)))
        chunks = [sequence.chunk(dice.choice([1, 2, 5, 13, 40])) for sequence in batch]
        results = engine.runner.step(chunks)
        for sequence, chunk, result in zip(batch, chunks, results, strict=True):
            token = result.token_id
            sequence.num_computed += len(chunk.token_ids)
            assert (token is None) == (chunk.sampling is None)
            if token is not None:
                sequence.tokens.append(token)
    for sequence in sequences:
        prompt = sequence.tokens[: sequence.num_prompt]
        assert sequence.answer == generate(engine, prompt, sequence.sampling)


def test_a_resumed_sequence_draws_what_it_would_have_drawn(
    random_checkpoint: Path, load_engine: LoadEngine
) -> None:
    engine = load_engine(random_checkpoint)
    answer = generate(engine, [5, 6, 7], WARM)
    resumed = generate(engine, [5, 6, 7, *answer[:15]], replace(WARM, max_tokens=25))
    assert resumed == answer[15:]


def test_not_a_number_in_a_recycled_block_does_not_reach_its_next_user(
    random_checkpoint: Path, load_engine: LoadEngine
) -> None:
    engine = load_engine(random_checkpoint)
    expected = generate(engine, [1, 2, 3], GREEDY)
    engine.cache.data.fill_(torch.nan)
    short, long = (
        Live([1, 2, 3], 3, [9, 8, 1, 30, 31, 32], GREEDY),
        Live(list(range(9)), 9, range(40, 50), GREEDY),
    )
    while not short.is_done:
        results = engine.runner.step([short.chunk(99), long.chunk(99)])
        for sequence, result in zip((short, long), results, strict=True):
            assert result.token_id is not None
            sequence.num_computed = len(sequence.tokens)
            sequence.tokens.append(result.token_id)
    assert short.answer == expected


def test_chunks_that_cannot_be_run_are_refused_before_anything_is_stored(
    random_checkpoint: Path, load_engine: LoadEngine
) -> None:
    engine = load_engine(random_checkpoint)
    good = ScheduledChunk([1, 2], 0, [0], None, 0)
    for bad, message in [
        (ScheduledChunk([], 0, [0], None, 0), "must have a token"),
        (ScheduledChunk([1], 8, [0], None, 0), "must cover it"),
        (ScheduledChunk([1], 0, [64], None, 0), "only the blocks 0 to 63"),
        (ScheduledChunk([160], 0, [1], None, 0), "the vocabulary has 160"),
        (ScheduledChunk([-1], 0, [1], None, 0), "token ids from -1"),
    ]:
        with pytest.raises(InvalidStepError, match=message):
            engine.runner.step([good, bad])
    assert engine.cache.blocks.count_nonzero() == 0
