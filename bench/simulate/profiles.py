"""How long a simulated worker's steps take, and how much it holds, from the profiles that there are.

`prelay profile --json` says it of one worker as it is, DistServe's profiles of a model by how it is split.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.simulate.splits import Split
from cluster.errors import ConfigError
from cluster.latency_profile import read_profile
from cluster.planner.measured import latency_of
from cluster.simulator.distserve_profile import DistServeProfile
from cluster.simulator.errors import SimulationError
from engine.latency import LatencyModel

KV_TOKENS = 65_536
"""Room of a worker of which nothing else is said."""


@dataclass(frozen=True, slots=True)
class WorkerProfile:
    """kv_tokens, model: None if the profile does not say."""

    latency: LatencyModel
    kv_tokens: int | None
    model: str | None = None


def is_distserve(path: Path) -> bool:
    """Whether the file says nothing of itself but has models in it. Raises SimulationError."""
    raw = _read(path)
    return isinstance(raw, dict) and "coefficients" not in raw and "latency" not in raw


def worker_profile(path: Path, model: str | None, split: Split) -> WorkerProfile:
    """Of a worker that is split like that. Raises SimulationError."""
    if not is_distserve(path):
        if (split.tp, split.pp) != (1, 1):
            raise SimulationError(
                f"tp={split.tp},pp={split.pp}: {path} is a profile of one worker as it is, not of others "
                "that are split differently; give tp=1,pp=1, or a profile of DistServe's"
            )
        try:
            latency, name = read_profile(path), _read(path).get("model")
        except ConfigError as error:
            raise SimulationError(str(error).replace("model.profile is", "--profile")) from error
        return WorkerProfile(latency, None, name if isinstance(name, str) else None)
    profile = DistServeProfile.read(path)
    times = profile.step_times(profile.named(_needed(profile, model)), split.tp, split.pp)
    return WorkerProfile(latency_of(times), times.capacity)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SimulationError(f"--profile {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise SimulationError(f"--profile {path} is not JSON: {error}") from error


def _needed(profile: DistServeProfile, model: str | None) -> str:
    if model is None:
        raise SimulationError(f"--model NAME is missing: {profile.path} has {', '.join(profile.models)}")
    return model
