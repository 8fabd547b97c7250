"""How long the steps of a worker take, from a file (`model.profile`) instead of a measurement."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.errors import ConfigError
from engine.latency import LatencyModel, ProfileError


def read_profile(path: Path) -> LatencyModel:
    """What `prelay profile --json` has printed, or its "latency" alone. Raises ConfigError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"model.profile is {path}, which is not there: `prelay profile --json {path}` writes it"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.profile is {path}, which cannot be read as JSON ({error}): write it with "
            "`prelay profile --json`"
        ) from error
    try:
        model = LatencyModel.from_json(raw.get("latency", raw) if isinstance(raw, dict) else raw)
    except ProfileError as error:
        raise ConfigError(f"model.profile is {path}, which cannot be used: {error}") from error
    if not model.is_known:
        raise ConfigError(
            f"model.profile is {path}, which has no coefficients: steps would take no time; profile again"
        )
    return model
