"""Step times that Splitwise measured (Patel et al., ISCA 2024), of whole machines of several generations.

The file has a row for each run of a model on a kind of device, split over some of them: how long a batch of
prompts took, and a token of each of its answers. Runs whose batch did not fit show as times that are shorter
than those of half the batch; they are left out.
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.planner.errors import NoPlanError, PlanError
from cluster.planner.hardware import Gpu, Hardware
from cluster.planner.kinds import Kind
from cluster.planner.memory import footprint
from engine.config import ModelConfig
from engine.latency import LatencyModel, StepShape
from engine.latency_fit import Sample, fit

_NAMES = {"a100-80g": "a100-80gb", "h100-80g": "h100-80gb", "h100-80g-capped": "h100-80gb-pcap"}
"""Of devices, as the file calls them."""
_COLUMNS = (
    "model", "hardware", "tensor_parallel", "prompt_size", "batch_size", "token_size",
    "prompt_time", "token_time",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Run:
    """Tokens of each prompt and answer; seconds of the prompts together, and of a token of each answer."""

    prompt: int
    batch: int
    answer: int
    prompt_s: float
    token_s: float


@dataclass(frozen=True, slots=True)
class SplitwiseProfile:
    """runs: by model, device as the file calls it, and tensor parallelism."""

    path: Path
    runs: Mapping[tuple[str, str, int], Sequence[_Run]]

    @classmethod
    def read(cls, path: Path) -> SplitwiseProfile:
        """Raises PlanError."""
        found: defaultdict[tuple[str, str, int], list[_Run]] = defaultdict(list)
        try:
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if missing := set(_COLUMNS) - set(reader.fieldnames or ()):
                    raise PlanError(
                        f"--profile {path}: it has no column {sorted(missing)[0]}, as Splitwise's have"
                    )
                for row in reader:
                    key = (row["model"], row["hardware"], int(row["tensor_parallel"]))
                    found[key].append(_run(row))
        except OSError as error:
            raise PlanError(f"--profile {path}: {error.strerror or error}") from error
        except (ValueError, TypeError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"--profile {path}: line {reader.line_num}: {error}") from error
        if not found:
            raise PlanError(f"--profile {path}: there is no row in it")
        return cls(path, found)

    @property
    def models(self) -> list[str]:
        return sorted({model for model, _, _ in self.runs})

    def splits(self, model: str, gpu: Gpu) -> list[int]:
        """Into how many of those devices somebody has split it."""
        device = _NAMES.get(gpu.name, gpu.name)
        return sorted(tp for name, hardware, tp in self.runs if (name, hardware) == (model, device))

    def latency(self, model: str, gpu: Gpu, tp: int) -> LatencyModel:
        """Of the steps of a worker that is split so."""
        runs = _that_fitted(self.runs[model, _NAMES.get(gpu.name, gpu.name), tp])
        samples = []
        for run in runs:
            samples.append(Sample(StepShape(((run.prompt, 0),) * run.batch), run.prompt_s))
            context = run.batch * (run.prompt + run.answer // 2)
            samples.append(Sample(StepShape((), run.batch, context), run.token_s))
        return fit(samples)


@dataclass(frozen=True, slots=True)
class SplitwiseKinds:
    """Of a model that the profile has; shape: the same model's sizes, for memory."""

    profile: SplitwiseProfile
    model: str
    shape: ModelConfig
    hardware: Hardware

    def kinds(self, longest: int) -> Sequence[Kind]:
        """Raises NoPlanError, PlanError."""
        if self.model not in self.profile.models:
            raise PlanError(
                f"--model {self.model}: {self.profile.path} has {', '.join(self.profile.models)}; "
                "give one of these"
            )
        found = []
        for devices in self.hardware.devices:
            gpu = devices.gpu
            for tp in self.profile.splits(self.model, gpu):
                if tp > min(self.hardware.per_node, devices.count):
                    continue
                size = footprint(self.shape, tp, 1, gpu.memory_bytes)
                if size.kv_tokens >= longest:
                    latency = self.profile.latency(self.model, gpu, tp)
                    found.append(Kind(gpu, tp, 1, latency, size.kv_tokens, size.kv_bytes, is_measured=True))
        if not found:
            raise NoPlanError(
                f"{self.model}: it was measured on {', '.join(sorted(_NAMES))}, and on none of these in "
                f"numbers that you have and that hold {longest} tokens of one sequence; give more, or others"
            )
        return found


def _run(row: Mapping[str, str]) -> _Run:
    return _Run(
        int(row["prompt_size"]),
        int(row["batch_size"]),
        int(row["token_size"]),
        float(row["prompt_time"]) / 1000,
        float(row["token_time"]) / 1000,
    )


def _that_fitted(runs: Sequence[_Run]) -> list[_Run]:
    """The median of runs that are alike; none of those whose batch took less than a smaller one."""
    alike: defaultdict[tuple[int, int, int], list[_Run]] = defaultdict(list)
    for run in runs:
        alike[run.prompt, run.answer, run.batch].append(run)
    found: list[_Run] = []
    slowest: dict[tuple[int, int], float] = {}
    for (prompt, answer, batch), some in sorted(alike.items()):
        prompt_s = statistics.median(run.prompt_s for run in some)
        if prompt_s < slowest.get((prompt, answer), 0.0):
            continue
        slowest[prompt, answer] = prompt_s
        found.append(_Run(prompt, batch, answer, prompt_s, statistics.median(run.token_s for run in some)))
    return found
