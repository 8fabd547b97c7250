"""Loading an engine and answering with it, in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.checkpoint import fingerprint
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.errors import OutOfBlocksError
from engine.generate import generate
from engine.layout import KvLayout
from engine.sequence import TokenSampling

LoadEngine = Callable[..., Engine]
GREEDY = TokenSampling(
    temperature=0, top_k=0, top_p=1.0, seed=0, max_tokens=30, min_tokens=0, stop_token_ids=frozenset()
)


def test_load_puts_the_cache_into_the_given_buffer(random_checkpoint: Path) -> None:
    config = EngineConfig(num_blocks=6, block_size=8, threads=1)
    layout = KvLayout.of(ModelConfig.from_pretrained(random_checkpoint), config)
    buffer = bytearray(6 * layout.block_nbytes)
    fractions: list[float] = []
    engine = Engine.load(random_checkpoint, config, memoryview(buffer), fractions.append)
    assert engine.layout == layout
    assert engine.fingerprint == fingerprint(random_checkpoint)
    assert torch.get_num_threads() == 1
    assert fractions[-1] == 1.0
    assert not any(buffer)
    generate(engine, [1, 2, 3], GREEDY)
    # 32 tokens have been computed, which is 4 blocks; the last token drawn has not.
    assert any(buffer[: 4 * layout.block_nbytes])
    assert not any(buffer[4 * layout.block_nbytes :])


def test_answers_end_with_a_stop_token_or_at_max_tokens(
    random_checkpoint: Path, load_engine: LoadEngine
) -> None:
    engine = load_engine(random_checkpoint)
    answer = generate(engine, [1, 2, 3], GREEDY)
    assert len(answer) == 30
    assert generate(engine, [1, 2, 3], replace(GREEDY, max_tokens=1)) == answer[:1]
    stop = next(token for at, token in enumerate(answer) if at >= 3 and token not in answer[:at])
    stopped = generate(engine, [1, 2, 3], replace(GREEDY, stop_token_ids=frozenset({stop})))
    assert stopped == answer[: answer.index(stop) + 1]
    patient = generate(engine, [1, 2, 3], replace(GREEDY, stop_token_ids=frozenset({stop}), min_tokens=30))
    assert patient[: len(stopped) - 1] == stopped[:-1]
    assert len(patient) == 30
    assert stop not in patient


def test_seeds_draw_different_answers_and_the_same_one_again(
    random_checkpoint: Path, load_engine: LoadEngine
) -> None:
    engine = load_engine(random_checkpoint)
    warm = replace(GREEDY, temperature=1.0)
    answers = [tuple(generate(engine, [1, 2, 3], replace(warm, seed=seed))) for seed in (1, 2, 1)]
    assert answers[0] == answers[2] != answers[1]


def test_what_does_not_fit_into_the_cache_is_refused(
    random_checkpoint: Path, load_engine: LoadEngine
) -> None:
    engine = load_engine(random_checkpoint, num_blocks=4)
    assert len(generate(engine, [1, 2], GREEDY)) == 30
    with pytest.raises(OutOfBlocksError, match=r"need 5 KV blocks of 8; this engine has 4"):
        generate(engine, [1, 2, 3], GREEDY)
