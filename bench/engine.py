"""The engine's prefill and decode beside transformers and the machine's limits, all in one run.

Rounds are interleaved: in each, the limits, then every case with the engine and with transformers. So drift
of a shared machine hits all alike, and ratios are taken within a round.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.baseline import TransformersBaseline
from bench.limits import Limits
from bench.timing import Spread, seconds_of
from bench.work import Work, decode_work, prefill_work
from engine.config import EngineConfig
from engine.engine import Engine
from engine.sequence import ScheduledChunk, TokenSampling

_GREEDY = TokenSampling(
    temperature=0, top_k=0, top_p=1.0, seed=0, max_tokens=1, min_tokens=0, stop_token_ids=frozenset()
)
_DECODE_STEPS = 4  # timed as one measurement, after one that is not: decoding goes on and on


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure. context: tokens of each decoding sequence, the new one included."""

    checkpoint: Path
    load: str
    dtype: str
    threads: int
    kernels: str
    prefill_tokens: Sequence[int]
    decode_batches: Sequence[int]
    context: int
    rounds: int
    with_transformers: bool


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the result; tokens: that a step of it makes (decode) or reads (prefill)."""

    phase: str
    size: int
    tokens: int
    work: Work
    ours: Callable[[], float]
    theirs: Callable[[], float] | None


def measure(settings: Settings, on_progress: Callable[[float, str], None]) -> dict[str, Any]:
    """The JSON object of `prelay bench engine`. on_progress: told the share that is done, and what comes."""
    on_progress(0.0, "loading")
    engine = load_engine(settings)
    on_progress(0.05, "starting an engine in a fresh process")
    ready_s = ready_seconds(settings)
    baseline = (
        TransformersBaseline(settings.checkpoint, settings.dtype) if settings.with_transformers else None
    )
    limits = Limits(settings.dtype)
    cases = list(_cases(settings, engine, baseline))
    rounds: list[tuple[float, float, list[float], list[float | None]]] = []
    # The first round warms up: kernels are chosen, memory is touched.
    for number in range(settings.rounds + 1):
        gflops, gbps = limits.gemm_gflops(), limits.read_gbps()
        ours: list[float] = []
        theirs: list[float | None] = []
        for index, case in enumerate(cases):
            done = (number + index / len(cases)) / (settings.rounds + 1)
            on_progress(0.1 + 0.9 * done, f"round {number} of {settings.rounds}: {case.phase} {case.size}")
            ours.append(case.ours())
            theirs.append(case.theirs() if case.theirs else None)
        if number:
            rounds.append((gflops, gbps, ours, theirs))
    on_progress(1.0, "done")
    gemm, read = Spread.of([r[0] for r in rounds]), Spread.of([r[1] for r in rounds])
    result: dict[str, Any] = {
        "dtype": settings.dtype,
        "threads": settings.threads,
        "rounds": settings.rounds,
        "ready_s": ready_s,
        "limits": {
            "gemm_gflops": gemm.median,
            "read_gbps": read.median,
            "gemm_gflops_spread": gemm.to_json(),
            "read_gbps_spread": read.to_json(),
        },
        "prefill": [],
        "decode": [],
    }
    for index, case in enumerate(cases):
        seconds = [r[2][index] for r in rounds]
        shares = [case.work.shortest_s(r[0], r[1]) / r[2][index] for r in rounds]
        others = [(r[3][index], r[2][index]) for r in rounds]
        row = _row(case, seconds, shares, [(theirs, ours) for theirs, ours in others if theirs is not None])
        if case.phase == "prefill":
            result["prefill"].append({"tokens": case.size, **row})
        else:
            result["decode"].append({"batch": case.size, "context": settings.context, **row})
    return result


def ready_seconds(settings: Settings) -> float:
    """From starting a process to an engine in it that could run a step, imports included."""
    arguments = [
        str(settings.checkpoint),
        settings.load,
        settings.dtype,
        str(settings.threads),
        settings.kernels,
    ]
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-P", "-m", "bench.ready", *arguments], check=True, stderr=subprocess.DEVNULL
    )
    return time.perf_counter() - started


def load_engine(settings: Settings) -> Engine:
    """An engine with room for the largest case."""
    block_size = 16
    tokens = max(
        max(settings.prefill_tokens, default=1),
        max(settings.decode_batches, default=1) * (settings.context + block_size),
    )
    config = EngineConfig(
        num_blocks=-(-tokens // block_size),
        block_size=block_size,
        max_batch_tokens=max(settings.prefill_tokens, default=1),
        dtype=settings.dtype,
        threads=settings.threads,
        load=settings.load,
        kernels=settings.kernels,
    )
    engine = Engine.load(settings.checkpoint, config, None, lambda fraction: None)
    # Zeros would do, but what nobody has written is one page of them, and reads of it cost nothing.
    engine.cache.data.normal_()
    return engine


def _cases(settings: Settings, engine: Engine, baseline: TransformersBaseline | None) -> Sequence[Case]:
    cases = []
    model = engine.model_config
    for tokens in settings.prefill_tokens:
        chunk = ScheduledChunk(
            [index % model.vocab_size for index in range(tokens)], 0, range(-(-tokens // 16)), _GREEDY, 0
        )
        cases.append(
            Case(
                "prefill",
                tokens,
                tokens,
                prefill_work(model, tokens, settings.dtype),
                _timed(engine, [chunk], 1),
                None if baseline is None else _timed_prefill(baseline, tokens),
            )
        )
    num_blocks = -(-settings.context // 16)
    for batch in settings.decode_batches:
        chunks = [
            ScheduledChunk(
                [index % model.vocab_size],
                settings.context - 1,
                range(index * num_blocks, (index + 1) * num_blocks),
                _GREEDY,
                0,
            )
            for index in range(batch)
        ]
        cases.append(
            Case(
                "decode",
                batch,
                batch,
                decode_work(model, batch, settings.context, settings.dtype),
                _timed(engine, chunks, _DECODE_STEPS),
                None if baseline is None else _timed_decode(baseline, batch, settings.context),
            )
        )
    return cases


def _timed(engine: Engine, chunks: Sequence[ScheduledChunk], steps: int) -> Callable[[], float]:
    def steps_in_a_row() -> None:
        for _ in range(steps):
            engine.runner.step(chunks)

    def timed() -> float:
        if steps > 1:
            engine.runner.step(chunks)
        return seconds_of(steps_in_a_row) / steps

    return timed


def _timed_prefill(baseline: TransformersBaseline, tokens: int) -> Callable[[], float]:
    return lambda: seconds_of(lambda: baseline.prefill(tokens))


def _timed_decode(baseline: TransformersBaseline, batch: int, context: int) -> Callable[[], float]:
    cache = baseline.context(batch, context)

    def timed() -> float:
        baseline.decode(cache, batch)
        return seconds_of(lambda: baseline.decode(cache, batch))

    return timed


def _row(
    case: Case, seconds: Sequence[float], shares: Sequence[float], pairs: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    """pairs: seconds of transformers and ours, of the same round."""
    speed, share = Spread.of([case.tokens / s for s in seconds]), Spread.of(shares)
    row: dict[str, Any] = {
        "tok_s": speed.median,
        "share_of_limit": share.median,
        "transformers_tok_s": None,
        "ratio": None,
        "tok_s_spread": speed.to_json(),
        "share_spread": share.to_json(),
    }
    if pairs:
        ratio = Spread.of([theirs / ours for theirs, ours in pairs])
        row["transformers_tok_s"] = Spread.of([case.tokens / theirs for theirs, _ in pairs]).median
        row["ratio"] = ratio.median
        row["ratio_spread"] = ratio.to_json()
    return row
