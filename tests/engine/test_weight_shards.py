"""Every split of a model: each shard is its part of the whole, read alone, in little more than its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.config import EngineConfig, ModelConfig
from engine.dummy import dummy_fingerprint, dummy_weights
from engine.engine import Engine
from engine.errors import CheckpointError, UnsupportedModelError
from engine.loading import fingerprint_of, weights_of
from engine.sequence import ScheduledChunk
from engine.shard import Shard
from engine.weights import ModelWeights, allocate_weights, load_weights, weight_parts

SPLITS = [(2, 1), (4, 1), (1, 3), (1, 2), (2, 2), (4, 3)]


def ranks(tp_size: int, pp_size: int) -> list[Shard]:
    return [Shard(tp, tp_size, pp, pp_size) for pp in range(pp_size) for tp in range(tp_size)]


def assert_equal(some: ModelWeights, other: ModelWeights) -> None:
    assert len(some.layers) == len(other.layers)
    for name in ("embedding", "final_norm", "lm_head"):
        assert_same(getattr(some, name), getattr(other, name))
    for one, another in zip(some.layers, other.layers, strict=True):
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(another, field.name))


def assert_same(some: torch.Tensor | None, other: torch.Tensor | None) -> None:
    assert (some is None) == (other is None)
    if some is not None and other is not None:
        assert torch.equal(some, other)


def cut(whole: ModelWeights, config: ModelConfig, shard: Shard) -> ModelWeights:
    """A rank's weights by the definition: rows and columns of the whole, which a file is not needed for."""
    assert whole.embedding is not None
    assert whole.lm_head is not None
    dim, tp = config.head_dim, shard.tp_size

    def heads(of: range) -> torch.Tensor:
        return torch.cat([torch.arange(head * dim, (head + 1) * dim) for head in of])

    kv = shard.kv_heads(config)
    query_rows = heads(shard.heads(config))
    key_rows = heads(range(config.num_heads + kv.start, config.num_heads + kv.stop))
    value_rows = key_rows + config.num_kv_heads * dim
    qkv = torch.cat([query_rows, key_rows, value_rows])
    inner = torch.tensor(shard.intermediate(config))
    gate_up = torch.cat([inner, inner + config.intermediate_size])

    def take(tensor: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
        return None if tensor is None else tensor[rows]

    layers = []
    for index in shard.layers(config):
        layer = whole.layers[index]
        layers.append(
            type(layer)(
                attention_norm=layer.attention_norm,
                qkv=layer.qkv[qkv],
                attention_out=layer.attention_out[:, query_rows],
                mlp_norm=layer.mlp_norm,
                gate_up=layer.gate_up[gate_up],
                down=layer.down[:, inner],
                qkv_bias=take(layer.qkv_bias, qkv),
                attention_out_bias=layer.attention_out_bias if shard.tp_rank == 0 else None,
                gate_up_bias=take(layer.gate_up_bias, gate_up),
                down_bias=layer.down_bias if shard.tp_rank == 0 else None,
                query_norm=layer.query_norm,
                key_norm=layer.key_norm,
            )
        )
    width = -(-config.vocab_size // tp)
    padding = torch.zeros(width * tp - config.vocab_size, config.hidden_size)
    mine = slice(shard.tp_rank * width, (shard.tp_rank + 1) * width)
    return ModelWeights(
        embedding=torch.cat([whole.embedding, padding])[mine] if shard.is_first_stage else None,
        layers=tuple(layers),
        final_norm=whole.final_norm if shard.is_last_stage else None,
        lm_head=torch.cat([whole.lm_head, padding])[mine] if shard.is_last_stage else None,
    )


@pytest.mark.parametrize(("tp_size", "pp_size"), SPLITS)
def test_a_shard_is_its_part_of_the_whole(checkpoint: Path, tp_size: int, pp_size: int) -> None:
    config = ModelConfig.from_pretrained(checkpoint)
    whole = load_weights(checkpoint, config, torch.float32, lambda fraction: None)
    for shard in ranks(tp_size, pp_size):
        if config.num_heads % tp_size or pp_size > config.num_layers:
            continue
        fractions = [0.0]
        weights = load_weights(checkpoint, config, torch.float32, fractions.append, shard)
        assert_equal(weights, cut(whole, config, shard))
        assert fractions[-1] == 1.0
        assert all(before <= after for before, after in pairwise(fractions))


@pytest.mark.parametrize(("tp_size", "pp_size"), SPLITS)
def test_a_shard_of_dummy_weights_is_its_part_of_the_whole(
    checkpoint: Path, tp_size: int, pp_size: int
) -> None:
    config = ModelConfig.from_pretrained(checkpoint)
    whole = dummy_weights(config, torch.float32, 5)
    for shard in ranks(tp_size, pp_size):
        fractions = [0.0]
        weights = dummy_weights(config, torch.float32, 5, shard, on_progress=fractions.append)
        assert_equal(weights, cut(whole, config, shard))
        assert fractions[-1] == 1.0
        assert all(before <= after for before, after in pairwise(fractions))


def test_the_padding_of_a_vocabulary_is_zero(new_checkpoint: Callable[..., Path]) -> None:
    path = new_checkpoint(vocab_size=5, tie_word_embeddings=True)
    config = ModelConfig.from_pretrained(path)
    for shard, num_own in zip(ranks(4, 1), (2, 2, 1, 0), strict=True):
        weights = load_weights(path, config, torch.float32, lambda fraction: None, shard)
        assert weights.lm_head is weights.embedding
        assert weights.lm_head is not None
        assert weights.lm_head.shape == (2, 64)
        assert weights.lm_head.any(dim=1).sum() == num_own


def test_a_split_that_does_not_divide_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(UnsupportedModelError, match="num_attention_heads"):
        load_weights(tmp_path, config, torch.float32, lambda fraction: None, Shard(0, 3))
    with pytest.raises(UnsupportedModelError, match="num_attention_heads"):
        dummy_weights(config, torch.float32, 0, Shard(0, 3))


def tiny_config(path: Path, **keys: object) -> ModelConfig:
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 160,
    }
    (path / "config.json").write_text(json.dumps(shape | keys))
    return ModelConfig.from_pretrained(path)


def test_dummy_weights_depend_on_seed_and_name_only(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    first, again, other = (dummy_weights(config, torch.float32, seed) for seed in (1, 1, 2))
    assert_equal(first, again)
    assert not torch.equal(first.layers[0].qkv, other.layers[0].qkv)
    assert not torch.equal(first.layers[0].qkv, first.layers[1].qkv)
    assert first.embedding is not None
    rounded = dummy_weights(config, torch.bfloat16, 1).embedding
    assert rounded is not None
    assert torch.equal(rounded, first.embedding.to(torch.bfloat16))


def test_dummy_weights_are_drawn_block_by_block(tmp_path: Path) -> None:
    """A matrix of many blocks: none of them repeats another, and all have the scale that they should."""
    config = tiny_config(tmp_path, hidden_size=1024, intermediate_size=2048, num_hidden_layers=1)
    down = dummy_weights(config, torch.float32, 0).layers[0].down
    assert len(torch.unique(down)) > 0.9 * down.numel()
    assert down.std().item() == pytest.approx(2048**-0.5, rel=0.01)
    assert abs(down.mean().item()) < 1e-4


def test_activations_of_a_dummy_model_stay_in_scale(
    tmp_path: Path,
    load_engine: Callable[..., Engine],
    logits_of: Callable[..., torch.Tensor],
) -> None:
    tiny_config(tmp_path, num_hidden_layers=30, hidden_size=128, vocab_size=1000)
    engine = load_engine(tmp_path, load="dummy", dtype="bfloat16")
    logits = logits_of(engine, [ScheduledChunk(range(200), 0, range(64), None, 0)])
    assert 0.3 < logits.std().item() < 3
    # Positions do not all like the same token.
    assert len(torch.unique(logits.argmax(dim=1))) > 20


def test_a_dummy_engine_needs_no_more_than_a_config(
    tmp_path: Path, load_engine: Callable[..., Engine]
) -> None:
    tiny_config(tmp_path)
    engine = load_engine(tmp_path, load="dummy")
    assert engine.fingerprint == dummy_fingerprint(tmp_path, 0)
    with pytest.raises(CheckpointError, match="has no weights"):
        load_engine(tmp_path)


def test_the_fingerprint_of_a_dummy_model_is_of_its_config_and_seed(tmp_path: Path) -> None:
    dummy = EngineConfig(num_blocks=1, load="dummy")
    tiny_config(tmp_path)
    original = fingerprint_of(tmp_path, dummy)
    assert dummy_fingerprint(tmp_path, 1) != original
    tiny_config(tmp_path, vocab_size=161)
    assert fingerprint_of(tmp_path, dummy) != original


def test_dummy_and_read_weights_have_the_same_shapes(checkpoint: Path) -> None:
    config = ModelConfig.from_pretrained(checkpoint)
    read, made = (
        weights_of(checkpoint, config, EngineConfig(num_blocks=1, load=load), lambda fraction: None)
        for load in ("weights", "dummy")
    )
    for one, another in zip(read.layers, made.layers, strict=True):
        for field in fields(one):
            tensors = getattr(one, field.name), getattr(another, field.name)
            assert (tensors[0] is None) == (tensors[1] is None)
            assert tensors[0] is None or tensors[0].shape == tensors[1].shape


PEAK = """
import sys, torch
from pathlib import Path
from engine.config import ModelConfig
from engine.dummy import dummy_weights
from engine.shard import Shard
from engine.weights import load_weights

def kib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

path, shard = Path(sys.argv[1]), Shard(int(sys.argv[2]), 2, int(sys.argv[3]), 2)
config = ModelConfig.from_pretrained(path)
# What torch allocates for itself, once.
torch.ones(300, 300) @ torch.ones(300, 300)
before = kib("VmRSS")
if sys.argv[4] == "weights":
    weights = load_weights(path, config, torch.bfloat16, lambda fraction: None, shard)
else:
    weights = dummy_weights(config, torch.bfloat16, 0, shard)
print(kib("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("load", "stored"),
    [("weights", torch.bfloat16), ("weights", torch.float32), ("dummy", torch.bfloat16)],
)
def test_loading_needs_less_than_a_fifth_more_memory_than_the_shard(
    tmp_path: Path, load: str, stored: torch.dtype
) -> None:
    """One file, larger than a shard by far, and a vocabulary that is the largest tensor by far."""
    config = tiny_config(
        tmp_path, num_hidden_layers=4, hidden_size=1024, intermediate_size=4096, vocab_size=100000
    )
    whole = weight_parts(allocate_weights(config, stored, Shard(), "meta"), config, Shard())
    save_file(
        {name: torch.ones(part.shape, dtype=stored) for name, part in whole.items()},
        tmp_path / "model.safetensors",
    )
    shard = Shard(1, 2, 1, 2)
    parts = weight_parts(allocate_weights(config, torch.bfloat16, shard, "meta"), config, shard)
    shard_bytes = 2 * sum(part.target.numel() for part in parts.values())
    assert shard_bytes > 100e6
    arguments = [str(tmp_path), str(shard.tp_rank), str(shard.pp_rank), load]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) * 1024 < 1.2 * shard_bytes
