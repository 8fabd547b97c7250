"""A checkpoint's weight files: found, opened, checked against what is expected of them, and told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from engine.config_file import read_json_object
from engine.errors import CheckpointError, UnsupportedModelError

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16")
_MIB = 2**20


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory, in order of name.

    Raises CheckpointError if one is missing, UnsupportedModelError for other formats.
    """
    if (path / _SINGLE_FILE).exists():
        return [path / _SINGLE_FILE]
    index = path / _INDEX_FILE
    if not index.exists():
        others = sorted(
            file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in path.glob(pattern)
        )
        if others:
            raise UnsupportedModelError(
                f"{path} has weights as {', '.join(others)}; supported is only safetensors"
            )
        raise CheckpointError(f"{path} has no weights: {_SINGLE_FILE} or {_INDEX_FILE} is needed")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is {weight_map!r}; it must map tensors to files")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or (path / name).is_dir():
            raise CheckpointError(f"{index}: {name!r} is not the name of a file in the same directory")
        if not (path / name).exists():
            raise CheckpointError(f"{path / name} is missing, but {_INDEX_FILE} names it")
    return [path / name for name in sorted(set(weight_map.values()))]


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """A safetensors file: keys(), and get_slice(name); what is read stays in memory until it is closed."""
    try:
        tensors = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) is truncated or not a safetensors file: {error}"
        ) from error
    with tensors:
        yield tensors


def check_files(
    files: Sequence[Path], expected: Mapping[str, tuple[int, ...]], redundant: Collection[str]
) -> None:
    """Raises unless the files together hold exactly the expected tensors, in shapes and types that fit.

    redundant: names of tensors that some checkpoints store although they follow from the rest.
    """
    missing = set(expected)
    for file in files:
        with open_tensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name in expected and name not in missing:
                    raise CheckpointError(f"{file} holds {name}, and so does another file: keep one of them")
                if name in expected:
                    _check_tensor(file, name, tensors.get_slice(name), expected[name])
                elif name not in redundant and not name.endswith("rotary_emb.inv_freq"):
                    raise CheckpointError(
                        f"{file} holds {name}, which the model that config.json describes does not have"
                    )
                missing.discard(name)
    if missing:
        few = ", ".join(sorted(missing)[:3])
        raise CheckpointError(
            f"{files[0].parent} lacks {len(missing)} of {len(expected)} tensors, such as {few}"
        )


def fingerprint(path: Path) -> str:
    """Identity of a model: SHA-256 over config.json and, of each weight file, its size, header and both ends.

    Two checkpoints that differ only deep inside a weight file of equal layout are taken for equal: this
    catches wrong versions and wrong fine-tunes within milliseconds, not a forger.
    """
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in weight_files(path):
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            digest.update(f"\n{file.name} {size} {header_size}\n".encode())
            digest.update(stream.read(min(header_size, size) + _MIB))
            stream.seek(max(0, size - _MIB))
            digest.update(stream.read(_MIB))
    return digest.hexdigest()


def _check_tensor(file: Path, name: str, stored: Any, shape: tuple[int, ...]) -> None:
    if tuple(stored.get_shape()) != shape:
        raise CheckpointError(
            f"{file}: {name} has shape {tuple(stored.get_shape())}, but by config.json it should be {shape}"
        )
    if stored.get_dtype() not in _DTYPES:
        raise UnsupportedModelError(
            f"{file}: {name} is stored as {stored.get_dtype()}; supported are {', '.join(_DTYPES)}"
        )
