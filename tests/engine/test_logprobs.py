"""Log-probabilities of answers and prompts are transformers', however the prompt is cut into chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.engine import Engine
from engine.logprobs import SLICE_ROWS, token_logprobs
from engine.sequence import ScheduledChunk, TokenLogprobs, TokenSampling

LoadEngine = Callable[..., Engine]
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]
# Parameters of every kind, none of which may show in the log-probabilities.
SAMPLING = TokenSampling(
    temperature=0.3, top_k=5, top_p=0.9, seed=1, max_tokens=4, min_tokens=0, stop_token_ids=frozenset(),
    logit_bias=((7, 3.0),), logprobs=4, prompt_logprobs=2,
)  # fmt: skip


def expected(scores: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """scores: [vocab_size], log-probabilities."""
    top = scores.argsort(descending=True)[:num_top].tolist()
    rank = 1 + int((scores > scores[token_id]).sum())
    return TokenLogprobs(
        token_id, float(scores[token_id]), rank, tuple((at, float(scores[at])) for at in top)
    )


def assert_close(got: TokenLogprobs, wanted: TokenLogprobs) -> None:
    assert (got.token_id, got.rank, [one[0] for one in got.top]) == (
        wanted.token_id, wanted.rank, [one[0] for one in wanted.top],
    )  # fmt: skip
    assert [got.logprob, *(one[1] for one in got.top)] == pytest.approx(
        [wanted.logprob, *(one[1] for one in wanted.top)], abs=1e-4
    )


@pytest.mark.parametrize("cut", [1, 5, 11, 12])
def test_a_request_is_scored_as_transformers_scores_it(
    random_checkpoint: Path, load_engine: LoadEngine, cut: int
) -> None:
    runner = load_engine(random_checkpoint).runner
    prompt: list[TokenLogprobs] = []
    tokens: list[int] = []
    answer: list[TokenLogprobs] = []
    # Beside a request without any wish, so that rows of several kinds lie in one batch.
    other = ScheduledChunk([1, 2, 3], 0, [9], replace(SAMPLING, logprobs=None, prompt_logprobs=None), 0)
    for start in range(0, len(PROMPT), cut):
        part = PROMPT[start : start + cut]
        rest = PROMPT[start + cut :]
        chunk = ScheduledChunk(
            part, start, [0, 1], None if rest else SAMPLING, 0, None, 2, rest[0] if rest else None
        )
        alone, result = runner.step([other, chunk])
        assert (alone.logprobs, alone.prompt_logprobs) == (None, ())
        prompt += result.prompt_logprobs
    while result.token_id is not None and len(tokens) < SAMPLING.max_tokens:
        assert result.logprobs is not None
        tokens.append(result.token_id)
        answer.append(result.logprobs)
        position = len(PROMPT) + len(tokens) - 1
        (result,) = runner.step([ScheduledChunk(tokens[-1:], position, [0, 1, 2], SAMPLING, len(tokens))])
        assert result.prompt_logprobs == ()
    model = AutoModelForCausalLM.from_pretrained(random_checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        scores = model(torch.tensor([PROMPT + tokens])).logits[0].log_softmax(dim=-1)
    sequence = PROMPT + tokens
    assert len(prompt) == len(PROMPT) - 1
    for index, got in enumerate([*prompt, *answer], start=1):
        assert_close(got, expected(scores[index - 1], sequence[index], 2 if index < len(PROMPT) else 4))


def test_rows_are_chosen_and_worked_on_in_slices() -> None:
    logits = torch.randn(3 * SLICE_ROWS, 50, generator=torch.Generator().manual_seed(2))
    rows = np.arange(1, 2 * SLICE_ROWS + 5)
    token_ids = [row * 7 % 50 for row in rows.tolist()]
    num_top = [row % 4 for row in rows.tolist()]
    found = token_logprobs(logits, rows, token_ids, num_top)
    assert [len(one.top) for one in found] == num_top
    scores = logits.log_softmax(dim=-1)
    for row, token_id, count, got in zip(rows.tolist(), token_ids, num_top, found, strict=True):
        assert_close(got, expected(scores[row], token_id, count))
