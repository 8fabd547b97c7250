"""Shards of any split: together everything exactly once, and each with what its own parts need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig, ModelConfig
from engine.errors import UnsupportedModelError
from engine.layout import KvLayout
from engine.rope_config import RopeConfig
from engine.shard import WHOLE, Shard

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=64,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    intermediate_size=96,
    vocab_size=101,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope=RopeConfig(10000.0),
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_ids=(),
    qkv_bias=False,
    attention_out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    windows=(None,) * 4,
)


@st.composite
def splits(draw: st.DrawFn) -> tuple[ModelConfig, int, int]:
    """A model, and a (tp_size, pp_size) that it can be split by."""
    tp_size = draw(st.integers(1, 8))
    num_kv_heads = draw(st.sampled_from([kv for kv in range(1, 17) if not (kv % tp_size and tp_size % kv)]))
    # Query heads are a multiple of both.
    num_heads = num_kv_heads * tp_size * draw(st.integers(1, 3))
    num_layers = draw(st.integers(1, 12))
    model = replace(
        MODEL,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=tp_size * draw(st.integers(1, 50)),
        vocab_size=draw(st.integers(1, 200)),
    )
    return model, tp_size, draw(st.integers(1, num_layers))


@given(splits())
def test_shards_cover_everything_exactly_once(split: tuple[ModelConfig, int, int]) -> None:
    model, tp_size, pp_size = split
    ranks = [Shard(tp, tp_size, 0, pp_size) for tp in range(tp_size)]
    stages = [Shard(0, tp_size, pp, pp_size) for pp in range(pp_size)]
    for shard in ranks + stages:
        shard.check(model)
    assert_in_order([shard.heads(model) for shard in ranks], model.num_heads)
    assert_in_order([shard.intermediate(model) for shard in ranks], model.intermediate_size)
    assert_in_order([shard.vocabulary(model) for shard in ranks], model.vocab_size)
    assert_in_order([shard.layers(model) for shard in stages], model.num_layers)
    # Everybody has as much to do, but for the layers, of which some stages have one more.
    assert len({len(shard.heads(model)) for shard in ranks}) == 1
    assert len({len(shard.intermediate(model)) for shard in ranks}) == 1
    sizes = [len(shard.layers(model)) for shard in stages]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert [stage.is_first_stage for stage in stages].count(True) == 1
    assert [stage.is_last_stage for stage in stages].count(True) == 1


def assert_in_order(parts: list[range], count: int) -> None:
    assert [index for part in parts for index in part] == list(range(count))


@given(splits())
def test_a_rank_has_the_kv_heads_of_its_query_heads(split: tuple[ModelConfig, int, int]) -> None:
    model, tp_size, _ = split
    group = model.num_heads // model.num_kv_heads
    for tp_rank in range(tp_size):
        shard = Shard(tp_rank, tp_size)
        kv_heads, heads = shard.kv_heads(model), shard.heads(model)
        assert {head // group for head in heads} == set(kv_heads)
        # Within the rank a query head finds its KV head as in a whole model of the rank's size.
        own_group = len(heads) // len(kv_heads)
        assert [heads[i] // group for i in range(len(heads))] == [
            kv_heads[i // own_group] for i in range(len(heads))
        ]


@given(splits())
def test_vocabulary_shards_are_padded_to_one_width(split: tuple[ModelConfig, int, int]) -> None:
    model, tp_size, _ = split
    width = -(-model.vocab_size // tp_size)
    for tp_rank in range(tp_size):
        tokens = Shard(tp_rank, tp_size).vocabulary(model)
        assert len(tokens) <= width
        # Rows of the padded shards lie side by side: a token's column is its id.
        assert not tokens or tokens.start == tp_rank * width


def test_the_whole_is_one_shard() -> None:
    assert (WHOLE.heads(MODEL), WHOLE.kv_heads(MODEL)) == (range(8), range(4))
    assert (WHOLE.intermediate(MODEL), WHOLE.vocabulary(MODEL)) == (range(96), range(101))
    assert WHOLE.layers(MODEL) == range(4)
    assert WHOLE.is_first_stage
    assert WHOLE.is_last_stage


def test_kv_heads_are_replicated_where_there_are_more_ranks() -> None:
    model = replace(MODEL, num_kv_heads=2)
    assert [Shard(rank, 8).kv_heads(model).start for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    layout = KvLayout.of(model, EngineConfig(num_blocks=1), Shard(5, 8, 1, 3))
    assert (layout.num_layers, layout.num_kv_heads) == (1, 1)


@pytest.mark.parametrize(
    ("change", "shard", "message"),
    [
        ({"num_heads": 9, "num_kv_heads": 9}, Shard(0, 2), r"over 2 ranks needs num_attention_heads .* is 9"),
        ({"intermediate_size": 97}, Shard(1, 2), r"needs intermediate_size to be a multiple of it; it is 97"),
        (
            {"num_heads": 12, "num_kv_heads": 6},
            Shard(0, 4),
            r"over 4 ranks needs num_key_value_heads, 6, to be a multiple or a divisor",
        ),
        ({}, Shard(0, 1, 0, 5), r"over 5 stages needs as many layers; there are 4"),
    ],
)
def test_what_does_not_divide_is_named(change: dict[str, Any], shard: Shard, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        shard.check(replace(MODEL, **change))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Shard(2, 2),
        lambda: Shard(-1, 2),
        lambda: Shard(0, 0),
        lambda: Shard(0, 1, 3, 3),
        lambda: Shard(0, 1, -1, 3),
    ],
)
def test_a_rank_that_does_not_exist_is_refused(make: Callable[[], Shard]) -> None:
    with pytest.raises(ValueError, match="there is no such rank"):
        make()
