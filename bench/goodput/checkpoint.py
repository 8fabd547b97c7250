"""The directory that a deployment loads its model from, where the experiment names only a shape.

A shape is a config.json. A server wants a tokenizer, too, and takes any whose tokens the model knows: that of
the demo model, as prompts are token ids and what answers say does not matter.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from bench.goodput.experiment import ModelPart
from cluster.config import demo_model_path
from cluster.errors import ConfigError
from cluster.latency_profile import read_profile
from cluster.workload.errors import BadInputError

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def checkpoint_of(model: ModelPart, shapes: Path, folder: Path) -> Path:
    """shapes: that come with prelay. folder: for what has to be written. Raises BadInputError."""
    if model.path is not None:
        return model.path
    config = shapes / str(model.shape) / "config.json"
    if not config.is_file():
        there = sorted(path.parent.name for path in shapes.glob("*/config.json"))
        raise BadInputError(f"model.shape: there is no {model.shape!r}; there are {', '.join(there)}")
    target = folder / str(model.shape)
    target.mkdir()
    shutil.copy(config, target)
    for name in _TOKENIZER:
        shutil.copy(demo_model_path() / name, target)
    return target


def profile_of(model: ModelPart, folder: Path) -> Path | None:
    """The latency model of a simulated one, its times scaled. Raises BadInputError."""
    if model.profile is None:
        return None
    try:
        latency = read_profile(model.profile)
    except ConfigError as error:
        raise BadInputError(str(error)) from error
    target = folder / "profile.json"
    target.write_text(json.dumps(latency.times(model.time_scale).to_json()))
    return target
