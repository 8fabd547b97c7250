"""How many bytes the KV of a token has, as it travels from a prefill to a decode worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.simulator.errors import SimulationError
from engine.config import DTYPE_NBYTES, ModelConfig
from engine.errors import CheckpointError

SHAPES = Path(__file__).parent.parent / "shapes"


def kv_bytes_of(chosen: dict[str, Any]) -> int:
    """--kv-bytes, or what --model says if it is a shape of prelay's or a checkpoint. Raises
    SimulationError."""
    if chosen["kv_bytes"] is not None:
        return int(chosen["kv_bytes"])
    if chosen["model"] is not None and (found := known_model(chosen["model"])) is not None:
        return kv_bytes(found)
    shapes = ", ".join(sorted(one.parent.name for one in SHAPES.glob("*/config.json")))
    raise SimulationError(
        "--kv-bytes N is missing, the bytes of KV of a token (2 * layers * KV heads * head size * 2); or "
        f"give a --model that is a checkpoint, or one of {shapes}"
    )


def model_of(name: str) -> ModelConfig:
    """A shape that comes with prelay, or a checkpoint's directory. Raises SimulationError."""
    model = known_model(name)
    if model is None:
        shapes = ", ".join(sorted(one.parent.name for one in SHAPES.glob("*/config.json")))
        raise SimulationError(f"--model {name}: no checkpoint lies there, and shapes are {shapes}")
    return model


def checkpoint_of(name: str) -> str | None:
    """Its directory, if that is what it is, with weights."""
    path = Path(name)
    return str(path.absolute()) if any(path.glob("*.safetensors")) else None


def known_model(name: str) -> ModelConfig | None:
    """The same, or None if nothing lies there. Raises SimulationError."""
    found = (path for path in (SHAPES / name, Path(name)) if (path / "config.json").exists())
    path = next(found, None)
    try:
        return None if path is None else ModelConfig.from_pretrained(path)
    except CheckpointError as error:
        raise SimulationError(f"--model {name}: {error}") from error


def kv_bytes(model: ModelConfig, dtype: str = "bfloat16") -> int:
    """Keys and values of a token in all layers."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * DTYPE_NBYTES[dtype]
