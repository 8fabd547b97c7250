"""Weight files: what is loaded, what is refused with which words, and what the fingerprint tells apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import fingerprint
from engine.config import ModelConfig
from engine.errors import CheckpointError, UnsupportedModelError
from engine.weights import ModelWeights, load_weights

NewCheckpoint = Callable[..., Path]


def load(path: Path) -> ModelWeights:
    config = ModelConfig.from_pretrained(path)
    return load_weights(path, config, torch.float32, lambda fraction: None)


def same(loaded: torch.Tensor | None, stored: torch.Tensor) -> bool:
    return loaded is not None and torch.equal(loaded, stored)


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) take away tensors of a single-file checkpoint; `__` stands for a dot."""
    file = path / "model.safetensors"
    stored = load_file(file) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, file)


def test_tensors_go_to_their_places_with_progress(new_checkpoint: NewCheckpoint) -> None:
    path = new_checkpoint(num_key_value_heads=2)
    stored = load_file(path / "model.safetensors")
    fractions: list[float] = []
    weights = load_weights(path, ModelConfig.from_pretrained(path), torch.float32, fractions.append)
    names = [f"model.layers.1.self_attn.{which}_proj.weight" for which in "qkv"]
    assert torch.equal(weights.layers[1].qkv, torch.cat([stored[name] for name in names]))
    names = [f"model.layers.2.mlp.{which}_proj.weight" for which in ("gate", "up")]
    assert torch.equal(weights.layers[2].gate_up, torch.cat([stored[name] for name in names]))
    assert same(weights.lm_head, stored["lm_head.weight"])
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_tied_embeddings_are_stored_once(new_checkpoint: NewCheckpoint) -> None:
    path = new_checkpoint(tie_word_embeddings=True)
    weights = load(path)
    assert weights.lm_head is weights.embedding


def test_several_files_with_an_index_are_one_checkpoint(
    tmp_path: Path, new_checkpoint: NewCheckpoint
) -> None:
    path = new_checkpoint(max_shard_size="60KB")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    stored = {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}
    weights = load(path)
    assert torch.equal(weights.layers[2].down, stored["model.layers.2.mlp.down_proj.weight"])
    assert same(weights.embedding, stored["model.embed_tokens.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_float_types_are_converted(new_checkpoint: NewCheckpoint, dtype: torch.dtype) -> None:
    path = new_checkpoint()
    norm = torch.full((64,), 0.1, dtype=dtype)
    change(path, model__norm__weight=norm)
    assert same(load(path).final_norm, norm.float())


def test_redundant_tensors_are_passed_over(new_checkpoint: NewCheckpoint) -> None:
    path = new_checkpoint(tie_word_embeddings=True)
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    change(
        path,
        lm_head__weight=torch.zeros(160, 64),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(8),
    )
    assert same(load(path).lm_head, embedding)


def test_missing_tensors_are_named(new_checkpoint: NewCheckpoint) -> None:
    path = new_checkpoint()
    change(path, model__norm__weight=None, lm_head__weight=None)
    with pytest.raises(CheckpointError, match=r"lacks 2 of 30 tensors, such as lm_head\.weight, model\.norm"):
        load(path)


def test_wrong_shapes_are_named(new_checkpoint: NewCheckpoint) -> None:
    path = new_checkpoint()
    change(path, model__norm__weight=torch.zeros(63))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \(63,\), .* should be \(64,\)"):
        load(path)


def test_a_config_of_another_size_costs_no_memory(new_checkpoint: NewCheckpoint) -> None:
    path = new_checkpoint()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 10**15}))
    with pytest.raises(CheckpointError, match=r"by config\.json it should be \(1000000000000000, 64\)"):
        load(path)


@pytest.mark.parametrize(
    "name", ["model__layers__0__self_attn__q_proj__bias", "model__layers__3__mlp__up_proj__weight"]
)
def test_tensors_beyond_the_architecture_are_refused(new_checkpoint: NewCheckpoint, name: str) -> None:
    path = new_checkpoint()
    change(path, **{name: torch.zeros(64)})
    with pytest.raises(
        CheckpointError, match=rf"{name.replace('__', '.')}, which the model .* does not have"
    ):
        load(path)


def test_a_tensor_that_is_there_twice_is_refused(new_checkpoint: NewCheckpoint) -> None:
    path = new_checkpoint()
    (path / "model.safetensors").rename(path / "a.safetensors")
    save_file({"model.norm.weight": torch.zeros(64)}, path / "b.safetensors")
    weight_map = {"model.norm.weight": "b.safetensors", "lm_head.weight": "a.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        CheckpointError, match=r"b\.safetensors holds model\.norm\.weight, and so does another"
    ):
        load(path)


def test_quantised_tensors_are_refused(new_checkpoint: NewCheckpoint) -> None:
    path = new_checkpoint()
    change(path, model__norm__weight=torch.zeros(64, dtype=torch.int8))
    with pytest.raises(UnsupportedModelError, match=r"stored as I8; supported are F32, F16, BF16"):
        load(path)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(new_checkpoint: NewCheckpoint, keep: float) -> None:
    path = new_checkpoint()
    content = (path / "model.safetensors").read_bytes()
    size = int(keep * len(content)) if keep < 1 else int(keep)
    (path / "model.safetensors").write_bytes(content[:size])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors \({size} bytes\) is truncated or not"):
        load(path)


def test_a_file_of_another_kind_is_refused(new_checkpoint: NewCheckpoint) -> None:
    path = new_checkpoint()
    (path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(path)


def test_missing_weights_are_named(new_checkpoint: NewCheckpoint) -> None:
    path = new_checkpoint()
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights: model\.safetensors or .* is needed"):
        load(path)
    (path / "pytorch_model.bin").touch()
    with pytest.raises(
        UnsupportedModelError, match=r"weights as pytorch_model\.bin; supported is only safetensors"
    ):
        load(path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "index.json cannot be read"),
        ("{}", "weight_map is None"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "not the name of a file in the same directory"),
        ('{"weight_map": {"a": 1}}', "1 is not the name of a file"),
        ('{"weight_map": {"a": ["b.safetensors"]}}', "is not the name of a file"),
        ('{"weight_map": {"a": ".."}}', r"'\.\.' is not the name of a file"),
        ('{"weight_map": {"a": ""}}', "'' is not the name of a file"),
        ('{"weight_map": {"a": "b.safetensors"}}', r"b\.safetensors is missing, but .* names it"),
    ],
)
def test_a_damaged_index_is_refused(new_checkpoint: NewCheckpoint, index: str, message: str) -> None:
    path = new_checkpoint()
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_the_fingerprint_is_of_the_content(tmp_path: Path, random_checkpoint: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(random_checkpoint, copy)
    original = fingerprint(random_checkpoint)
    assert fingerprint(copy) == original
    change(copy, model__norm__weight=torch.full((64,), 3.0))
    assert fingerprint(copy) != original
    shutil.copy(random_checkpoint / "model.safetensors", copy)
    assert fingerprint(copy) == original
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert fingerprint(copy) != original


def test_the_fingerprint_reads_header_and_both_ends_of_large_files(new_checkpoint: NewCheckpoint) -> None:
    path = new_checkpoint()
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes() + bytes(4 * 2**20))
    size = file.stat().st_size
    prints = {fingerprint(path)}
    for changed in (0, 100, 2**20, size - 2**20, size - 1):
        content = bytearray(file.read_bytes())
        content[changed] ^= 1
        (path / "model.safetensors").write_bytes(content)
        prints.add(fingerprint(path))
    assert len(prints) == 6
