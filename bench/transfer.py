"""Backends and hand-offs beside what the machine allows: what `prelay bench transfer` puts together.

Everything that is compared is measured in the same processes, by turns (pulls.py, handoff.py); shares are
taken within a round.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.handoff import BATCH, MODES, HandOff, HandoffSettings, Round, measure_hand_offs
from bench.pulls import measure_pulls
from bench.timing import Spread
from engine.config import EngineConfig, ModelConfig
from engine.layout import KvLayout
from transfer.layout import WorkerLayout

DTYPE = "bfloat16"
_BATCH_TOKENS = 512
_PREFILL_SHARE = 0.05
"""A hand-off may expose a decode step and this part of the prefill."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure. sizes: MiB of blocks. cores: two, of the sending and of the receiving side."""

    checkpoint: Path
    load: str
    backends: Sequence[str]
    sizes: Sequence[int]
    prompt_tokens: Sequence[int]
    rounds: int
    cores: tuple[int, int]


def measure(settings: Settings, on_progress: Callable[[float, str], None]) -> dict[str, Any]:
    """The JSON object of `prelay bench transfer`. on_progress: told the share that is done, and what comes.

    Raises MeasurementError.
    """
    model = ModelConfig.from_pretrained(settings.checkpoint)
    whole = KvLayout.of(model, EngineConfig(num_blocks=1, dtype=DTYPE))
    result: dict[str, Any] = {
        "dtype": DTYPE,
        "rounds": settings.rounds,
        "backends": [],
        "exposed": [],
        "slowdown": [],
    }
    with asyncio.Runner() as runner:
        for index, backend in enumerate(settings.backends):

            def on_round(part: int, what: str, number: int, before: int = index, name: str = backend) -> None:
                # Hand-offs take most of the time.
                share = (part / 10, 0.8 if part == 2 else 0.1)
                done = before + share[0] + share[1] * number / (settings.rounds + 1)
                on_progress(
                    done / len(settings.backends), f"{name}, {what}, round {number} of {settings.rounds}"
                )

            result["backends"] += _backend_rows(settings, backend, whole, on_round)
            rounds = _hand_offs(settings, backend, model, runner, on_round)
            result["exposed"] += [_exposed_row(backend, tokens, rounds) for tokens in settings.prompt_tokens]
            result["slowdown"].append(_slowdown_row(backend, rounds))
    on_progress(1.0, "done")
    # Of the first backend, which is the best one by default.
    result["decode_step_slowdown"] = result["slowdown"][0]["ratio"]
    return result


def _backend_rows(
    settings: Settings, backend: str, whole: KvLayout, on_round: Callable[[int, str, int], None]
) -> list[dict[str, Any]]:
    counts = [max(1, round(size * 2**20 / whole.block_nbytes)) for size in settings.sizes]
    target = WorkerLayout.of(whole)
    split = WorkerLayout.of(whole, _tp_size(whole.num_kv_heads))
    equal, unequal = (
        measure_pulls(
            backend,
            source,
            target,
            counts,
            settings.rounds,
            settings.cores,
            lambda number, part=part, what=what: on_round(part, what, number),  # type: ignore[misc]
        )
        for part, what, source in ((0, "equal layouts", target), (1, "unequal layouts", split))
    )
    rows = []
    for at, (size, count) in enumerate(zip(settings.sizes, counts, strict=True)):
        nbytes = count * whole.block_nbytes
        cases, others = [found[at] for found in equal], [found[at] for found in unequal]
        limits = [case.limit_s for case in cases]
        rows.append(
            {
                "name": backend,
                "mb": size,
                **_speed(nbytes, [case.pull_s for case in cases], limits),
                "latency_ms": Spread.of([case.pull_s for case in cases]).median * 1e3,
                "num_blocks": count,
                "limit": "memcpy" if backend == "ipc" else "tcp",
                "limit_gbps": Spread.of([nbytes / limit / 1e9 for limit in limits]).median,
                "scattered": _speed(nbytes, [case.scattered_s for case in cases], limits),
                "unequal": {
                    "source_tp": split.tp_size,
                    **_speed(nbytes, [case.pull_s for case in others], [case.limit_s for case in others]),
                },
            }
        )
    return rows


def _speed(nbytes: int, seconds: Sequence[float], limits: Sequence[float]) -> dict[str, Any]:
    gbps = Spread.of([nbytes / each / 1e9 for each in seconds])
    share = Spread.of([limit / each for limit, each in zip(limits, seconds, strict=True)])
    return {
        "gbps": gbps.median,
        "share_of_limit": share.median,
        "gbps_spread": gbps.to_json(),
        "share_spread": share.to_json(),
    }


def _tp_size(num_kv_heads: int) -> int:
    """The smallest that splits the heads evenly; with one head, two ranks have it both."""
    return next((size for size in range(2, num_kv_heads + 1) if num_kv_heads % size == 0), 2)


def _hand_offs(
    settings: Settings,
    backend: str,
    model: ModelConfig,
    runner: asyncio.Runner,
    on_round: Callable[[int, str, int], None],
) -> list[Round]:
    return measure_hand_offs(
        HandoffSettings(
            settings.checkpoint,
            settings.load,
            backend,
            settings.prompt_tokens,
            min(_BATCH_TOKENS, model.max_position_embeddings // 4),
            settings.rounds,
            settings.cores,
        ),
        runner,
        lambda number: on_round(2, "hand-offs", number),
    )


def _exposed_row(backend: str, prompt_tokens: int, rounds: Sequence[Round]) -> dict[str, Any]:
    def of(is_busy: bool) -> dict[str, Any]:
        overlap, whole = (
            [found.hand_offs[prompt_tokens, mode, is_busy] for found in rounds] for mode in MODES
        )
        step_ms = _ms([each.decode_step_s for each in overlap])
        prefill_ms = _ms([each.prefill_s for each in overlap])
        return {
            "overlap_ms": _ms([each.exposed_s for each in overlap]),
            "no_overlap_ms": _ms([each.exposed_s for each in whole]),
            "decode_step_ms": step_ms,
            "prefill_ms": prefill_ms,
            "goal_ms": step_ms + _PREFILL_SHARE * prefill_ms,
            "overlap_spread": _spread(overlap),
            "no_overlap_spread": _spread(whole),
            "overlap_transfer_ms": _ms([each.transfer_s for each in overlap]),
            "overlap_decode_queue_ms": _ms([each.decode_queue_s for each in overlap]),
            "no_overlap_transfer_ms": _ms([each.transfer_s for each in whole]),
            "no_overlap_decode_queue_ms": _ms([each.decode_queue_s for each in whole]),
        }

    return {
        "backend": backend,
        "prompt_tokens": prompt_tokens,
        **of(is_busy=False),
        "busy": {"batch": BATCH, **of(is_busy=True)},
    }


def _slowdown_row(backend: str, rounds: Sequence[Round]) -> dict[str, Any]:
    steps = [found.steps for found in rounds]
    ratio = Spread.of([each.fetching_s / each.alone_s for each in steps])
    beside = [each.beside_prefill_s for each in steps if each.beside_prefill_s is not None]
    copies = [each.fetching_s / each.beside_prefill_s for each in steps if each.beside_prefill_s is not None]
    return {
        "backend": backend,
        "batch": BATCH,
        "ratio": ratio.median,
        "ratio_spread": ratio.to_json(),
        "ratio_to_prefill": Spread.of(copies).median if copies else None,
        "alone_ms": _ms([each.alone_s for each in steps]),
        "beside_prefill_ms": _ms(beside) if beside else None,
        "fetching_ms": _ms([each.fetching_s for each in steps]),
    }


def _spread(hand_offs: Sequence[HandOff]) -> dict[str, float]:
    return Spread.of([each.exposed_s * 1e3 for each in hand_offs]).to_json()


def _ms(seconds: Sequence[float]) -> float:
    return Spread.of(seconds).median * 1e3
