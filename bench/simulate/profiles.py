"""How long a simulated worker's steps take, and how much it holds, from the profiles that there are.

`prelay profile --json` says it of one worker as it is, DistServe's profiles of a model by how it is split.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from bench.simulate.splits import Split
from cluster.errors import ConfigError
from cluster.latency_profile import read_profile
from cluster.simulator.distserve_profile import DistServeProfile, StepTimes
from cluster.simulator.errors import SimulationError
from engine.latency import LatencyModel, StepShape
from engine.latency_fit import Sample, fit

KV_TOKENS = 65_536
"""Room of a worker of which nothing else is said."""

_PREFILLS = (64, 128, 256, 512, 1024, 2048, 4096)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 94, 95, 128, 192, 256)
_CONTEXTS = (64, 256, 512, 1024, 2048)


@dataclass(frozen=True, slots=True)
class WorkerProfile:
    """kv_tokens: None if the profile does not say."""

    latency: LatencyModel
    kv_tokens: int | None


def is_distserve(path: Path) -> bool:
    """Whether the file says nothing of itself but has models in it. Raises SimulationError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SimulationError(f"--profile {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise SimulationError(f"--profile {path} is not JSON: {error}") from error
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
            return WorkerProfile(read_profile(path), None)
        except ConfigError as error:
            raise SimulationError(str(error).replace("model.profile is", "--profile")) from error
    profile = DistServeProfile.read(path)
    times = profile.step_times(profile.named(_needed(profile, model)), split.tp, split.pp)
    return WorkerProfile(latency_of(times), times.capacity)


def _needed(profile: DistServeProfile, model: str | None) -> str:
    if model is None:
        raise SimulationError(f"--model NAME is missing: {profile.path} has {', '.join(profile.models)}")
    return model


def latency_of(times: StepTimes) -> LatencyModel:
    """The same step times as a model that production's cores take. A step passes all stages one after the
    other, as the engine's does; what the first one costs more, it costs once.

    Of two lines by the size of the batch it makes one that bends, and so is off where they do not meet.
    """
    samples = [Sample(StepShape(((length, 0),)), times.pp * _stage_s(times, length)) for length in _PREFILLS]
    for batch, each in itertools.product(_BATCHES, _CONTEXTS):
        seconds = times.pp * times.decode_s(batch, batch * each, is_first=False)
        samples.append(Sample(StepShape((), batch, batch * each), seconds))
    return fit(samples)


def _stage_s(times: StepTimes, length: int) -> float:
    return times.prefill_s(length, length * length, is_first=False)
