"""The model against transformers, for every family: same answers, same logits, and bfloat16 no worse."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.attention.sdpa import SdpaAttention
from engine.batch import FlatBatch
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.generate import generate
from engine.kernels.torch_ops import TorchKernels
from engine.kv_cache import KvCache
from engine.layout import KvLayout
from engine.model import LlamaModel
from engine.parallel.base import Solo
from engine.sequence import ScheduledChunk, TokenSampling
from engine.shard import WHOLE
from engine.weights import load_weights

NUM_STEPS = 200
GREEDY = TokenSampling(
    temperature=0, top_k=0, top_p=1.0, seed=0, max_tokens=NUM_STEPS, min_tokens=0, stop_token_ids=frozenset()
)
LoadEngine = Callable[..., Engine]
LoadReference = Callable[..., Any]
LogitsOf = Callable[[Engine, Sequence[ScheduledChunk]], torch.Tensor]


@dataclass(frozen=True)
class Bfloat16:
    """What transformers makes of `tokens` with weights rounded to bfloat16: logits [num_tokens, vocab_size].

    in_one_piece, one_by_one: computed in bfloat16. They differ, because their linear layers see batches of
    other sizes. exact: computed in float32.
    """

    tokens: list[int]
    in_one_piece: torch.Tensor
    one_by_one: torch.Tensor
    exact: torch.Tensor


def random_tokens(vocab_size: int, length: int, seed: int) -> list[int]:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def sure_answers(reference: Any, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Random prompts and their greedy answers of NUM_STEPS tokens, by transformers.

    Only those in which the best token leads by more than the difference in logits that we allow.
    """
    for seed in range(10):
        prompt = random_tokens(reference.config.vocab_size, length, seed)
        found = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, length),
            max_new_tokens=NUM_STEPS,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best, second = torch.cat(found.logits).topk(2).values.unbind(-1)
        if (best - second).min() > 2e-4:
            yield prompt, found.sequences[0, length:].tolist()


def random_chunks(tokens: Sequence[int], longest: int, dice: random.Random) -> Iterator[ScheduledChunk]:
    """One sequence, cut anywhere."""
    start = 0
    while start < len(tokens):
        stop = start + dice.randint(1, longest)
        yield ScheduledChunk(tokens[start:stop], start, range(64), None, 0)
        start = stop


@pytest.mark.parametrize("length", [1, 40])
def test_greedy_answers_are_those_of_transformers(
    checkpoint: Path, load_engine: LoadEngine, load_reference: LoadReference, length: int
) -> None:
    engine = load_engine(checkpoint, max_batch_tokens=16)
    prompt, expected = next(sure_answers(load_reference(checkpoint), length))
    assert generate(engine, prompt, GREEDY) == expected


def test_logits_of_every_position_are_those_of_transformers(
    checkpoint: Path, load_engine: LoadEngine, load_reference: LoadReference, logits_of: LogitsOf
) -> None:
    engine = load_engine(checkpoint)
    tokens = random_tokens(engine.model_config.vocab_size, 300, seed=1)
    with torch.inference_mode():
        expected = load_reference(checkpoint)(torch.tensor([tokens])).logits[0]
    found = [logits_of(engine, [chunk]) for chunk in random_chunks(tokens, 40, random.Random(1))]
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def bfloat16(checkpoint: Path, load_reference: LoadReference) -> Bfloat16:
    tokens = random_tokens(ModelConfig.from_pretrained(checkpoint).vocab_size, 120, seed=2)
    reference = load_reference(checkpoint, torch.bfloat16)
    with torch.inference_mode():
        in_one_piece = reference(torch.tensor([tokens])).logits[0].float()
        one_by_one = torch.cat(list(stepwise_logits(reference, tokens)))
        exact = reference.float()(torch.tensor([tokens])).logits[0]
    return Bfloat16(tokens, in_one_piece, one_by_one, exact)


@pytest.mark.parametrize("longest", [1, 120])
def test_bfloat16_is_as_exact_as_that_of_transformers(
    checkpoint: Path, bfloat16: Bfloat16, load_engine: LoadEngine, logits_of: LogitsOf, longest: int
) -> None:
    engine = load_engine(checkpoint, dtype="bfloat16")
    chunks = random_chunks(bfloat16.tokens, longest, random.Random(2))
    found = torch.cat([logits_of(engine, [chunk]) for chunk in chunks])
    assert found.dtype == torch.float32
    theirs = distance(bfloat16.in_one_piece, bfloat16.exact), distance(bfloat16.one_by_one, bfloat16.exact)
    assert distance(found, bfloat16.exact) < 1.1 * max(theirs)


@pytest.mark.parametrize("longest", [1, 120])
def test_bfloat16_of_plain_torch_varies_no_more_than_transformers_does(
    checkpoint: Path, bfloat16: Bfloat16, longest: int
) -> None:
    """Other kernels may round less, which takes them away from transformers, and nearer to float32."""
    config = ModelConfig.from_pretrained(checkpoint)
    weights = load_weights(checkpoint, config, torch.bfloat16, lambda fraction: None)
    layout = KvLayout.of(config, EngineConfig(num_blocks=64, block_size=8, dtype="bfloat16"))
    attention = SdpaAttention(KvCache(layout, 64), config.windows)
    executor = LocalExecutor(LlamaModel(config, WHOLE, weights, TorchKernels(), Solo()), attention)
    batches = [
        FlatBatch.of([chunk], 8, 64, config.vocab_size)
        for chunk in random_chunks(bfloat16.tokens, longest, random.Random(2))
    ]
    rows = [executor.logits(replace(batch, wanted=np.arange(batch.num_tokens))) for batch in batches]
    between = distance(bfloat16.one_by_one, bfloat16.in_one_piece)
    assert distance(torch.cat(rows), bfloat16.in_one_piece) < 1.5 * between


def stepwise_logits(reference: Any, tokens: Sequence[int]) -> Iterator[torch.Tensor]:
    cache = None
    for token in tokens:
        output = reference(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        yield output.logits[0].float()


def distance(some: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square over all logits."""
    return (some - other).square().mean().sqrt().item()
