"""Measures an engine and fits the latency model to it: `prelay profile`."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.latency import LatencyModel
from engine.latency_fit import Sample, fit, relative_errors
from engine.profiler import Limits, choose_steps, measure, num_blocks_of


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """What to profile. max_context: longest sequence of a measured step."""

    checkpoint: Path
    name: str
    load: str
    dtype: str
    threads: int
    kernels: str
    max_batch_tokens: int
    max_num_seqs: int
    max_context: int
    repeats: int


@dataclass(frozen=True, slots=True)
class Profile:
    """A fitted model, and the steps that it was fitted to and judged by."""

    model: LatencyModel
    fitted: Sequence[Sample]
    held_out: Sequence[Sample]
    fingerprint: str

    def errors(self) -> dict[str, float]:
        """Relative errors on the held-out steps."""
        errors = relative_errors(self.model, self.held_out)
        return {"median": float(np.median(errors)), "p95": float(np.quantile(errors, 0.95))}


def run_profile(settings: ProfileSettings, on_progress: Callable[[float, str], None]) -> Profile:
    """Load, measure, fit. on_progress: told the share that is done, and what comes."""
    on_progress(0.0, "loading")
    model_config = ModelConfig.from_pretrained(settings.checkpoint)
    context = min(settings.max_context, model_config.max_position_embeddings)
    limits = Limits(
        settings.max_batch_tokens,
        settings.max_num_seqs,
        context,
        settings.max_num_seqs * context + settings.max_batch_tokens,
    )
    steps = choose_steps(limits)
    shapes = [*steps.fitted, *steps.held_out]
    config = EngineConfig(
        num_blocks=max(num_blocks_of(shape, 16) for shape in shapes),
        max_batch_tokens=settings.max_batch_tokens,
        dtype=settings.dtype,
        threads=settings.threads,
        load=settings.load,
        kernels=settings.kernels,
    )
    engine = Engine.load(settings.checkpoint, config, None, lambda fraction: None)
    engine.cache.data.normal_()  # untouched memory is one page of zeros, and reading it costs nothing
    samples = measure(
        engine.runner,
        shapes,
        config.block_size,
        model_config.vocab_size,
        settings.repeats,
        time.perf_counter,
        lambda fraction: on_progress(0.05 + 0.95 * fraction, f"measuring {len(shapes)} steps"),
    )
    fitted, held_out = samples[: len(steps.fitted)], samples[len(steps.fitted) :]
    on_progress(1.0, "done")
    return Profile(fit(fitted), fitted, held_out, engine.fingerprint)


def to_json(profile: Profile, settings: ProfileSettings) -> dict[str, Any]:
    """What `prelay profile --json` writes, and what routers, planner and simulator read."""
    return {
        "model": settings.name,
        "fingerprint": profile.fingerprint,
        "dtype": settings.dtype,
        "threads": settings.threads,
        "machine": cpu_name(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("prelay", "torch")},
        },
        "latency": profile.model.to_json(),
        "error": profile.errors(),
        "samples": {
            "fitted": [_sample(sample) for sample in profile.fitted],
            "held_out": [_sample(sample) for sample in profile.held_out],
        },
    }


def error_rows(profile: Profile) -> list[tuple[str, int, float, float]]:
    """Kind of step, how many are held out, median and 95th percentile of the error; the last row is all."""
    kinds: dict[str, list[Sample]] = {"prefill": [], "decode": [], "mixed": []}
    for sample in profile.held_out:
        kinds[sample.shape.phase].append(sample)
    rows = []
    for name, samples in [*kinds.items(), ("all", list(profile.held_out))]:
        if samples:
            errors = relative_errors(profile.model, samples)
            rows.append((name, len(samples), statistics.median(errors), float(np.quantile(errors, 0.95))))
    return rows


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the CPU calls itself."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or sys.platform


def _sample(sample: Sample) -> dict[str, Any]:
    shape = sample.shape
    return {
        "prefill": [list(chunk) for chunk in shape.prefill],
        "decode_batch": shape.decode_batch,
        "decode_context": shape.decode_context,
        "seconds": sample.seconds,
    }
