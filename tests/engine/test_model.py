"""The model against transformers in float32: same logits, same greedy answers, for every shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from engine.engine import Engine
from engine.generate import generate
from engine.sequence import ScheduledChunk, TokenSampling

GREEDY = TokenSampling(
    temperature=0, top_k=0, top_p=1.0, seed=0, max_tokens=120, min_tokens=0, stop_token_ids=frozenset()
)
LoadEngine = Callable[..., Engine]


def random_prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in (1, 7, 60)]


def test_greedy_answers_are_those_of_transformers(checkpoint: Path, load_engine: LoadEngine) -> None:
    engine = load_engine(checkpoint, max_batch_tokens=16)
    reference = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for prompt in random_prompts(engine.model_config.vocab_size):
        expected = reference.generate(  # type: ignore[misc]
            torch.tensor([prompt]), max_new_tokens=120, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        answer = generate(engine, prompt, GREEDY)
        assert answer == expected[0, len(prompt) :].tolist()


def test_logits_of_every_position_are_those_of_transformers(
    checkpoint: Path, load_engine: LoadEngine
) -> None:
    engine = load_engine(checkpoint)
    reference = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt = random_prompts(engine.model_config.vocab_size)[-1]
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    first = [ScheduledChunk(prompt[:20], 0, range(8), None, 0)]
    rest = [ScheduledChunk([token], at, range(8), None, 0) for at, token in enumerate(prompt) if at >= 20]
    rows = [engine.runner.logits([chunk], [0]) for chunk in first + rest]
    assert (torch.cat(rows) - expected[19:]).abs().max() < 1e-4


def test_bfloat16_is_close_to_float32(random_checkpoint: Path, load_engine: LoadEngine) -> None:
    chunk = [ScheduledChunk(random_prompts(160)[-1], 0, range(8), None, 0)]
    exact = load_engine(random_checkpoint).runner.logits(chunk, [0])
    rounded = load_engine(random_checkpoint, dtype="bfloat16").runner.logits(chunk, [0])
    assert rounded.dtype == torch.float32
    assert torch.cosine_similarity(exact, rounded).item() == pytest.approx(1, abs=0.01)
