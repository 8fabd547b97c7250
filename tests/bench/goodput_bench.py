"""A workbench whose deployments exist only on paper: a rate gets the attainment that a test says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bench.goodput.experiment import Experiment, MeasurePart
from bench.goodput.sources import Source
from bench.goodput.teller import Teller
from bench.goodput.venue import ThisMachine
from bench.goodput.visit import window_s
from cluster.config import ServeConfig
from cluster.workload.jobs import Row, Status
from cluster.workload.judge import judge
from cluster.workload.slo import IdlePoint, IdleTimes, Limits, Slo

SERVED: dict[str, Any] = {
    "pair": {"serve": {"router": {"policy": "goodput"}}},
    "fcfs": {"serve": {"router": {"policy": "least_loaded"}}},
    "mixed": {
        "serve": {
            "router": {"policy": "colocated"},
            "prefill": {"replicas": 0},
            "decode": {"replicas": 0},
            "mixed": {"replicas": 2},
        },
        "search": {"mixed.max_batch_tokens": [64, 128, 256]},
    },
}


def experiment(demo: Path, **changes: Any) -> Experiment:
    raw: dict[str, Any] = {
        "model": {"path": demo, "load": "weights", "dtype": "float32"},
        "common": {name: {"kv_cache_tokens": 4096} for name in ("prefill", "decode", "mixed")},
        "deployments": SERVED,
        "workloads": {"short": {"dataset": "synthetic:prompt=64,answer=4", "slo": "ttft=3x,tpot=2x"}},
        "measure": {"rounds": 2, "seconds": 100.0, "min_requests": 1, "warmup_s": 0.0},
    }
    return Experiment.model_validate({**raw, **changes})


@dataclass
class PaperBench:
    """knee: the rate up to which a deployment with this configuration serves all in time; from there on
    attainment falls to nothing at twice the rate. ttft_s: of those in time, so that tighter limits can be
    judged; alone_s: of a request alone. started: policy and chunk size of every start. fails_after: points
    that are measured before the deployment is lost."""

    knee: Callable[[ServeConfig], float]
    ttft_s: float = 0.1
    alone_s: float = 0.1
    started: list[tuple[str, int]] = field(default_factory=list)
    measured: list[tuple[str, float, int]] = field(default_factory=list)
    fails_after: int | None = None

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Instead of real deployments."""
        patch.setattr(ThisMachine, "visiting", lambda machine, config, show: self.visiting(config, show))

    @asynccontextmanager
    async def visiting(self, config: ServeConfig, show: Callable[[str], None]) -> AsyncIterator[PaperVisit]:
        show("starting")
        self.started.append((config.router.policy, config.mixed.max_batch_tokens))
        yield PaperVisit(self, config)


@dataclass
class PaperVisit:
    bench: PaperBench
    config: ServeConfig

    async def idle_times(self, source: Source, *_: object) -> IdleTimes:
        tpot_s = 0.01 if self.config.prefill.replicas else 0.02
        return IdleTimes([IdlePoint(64, self.bench.alone_s, tpot_s)])

    async def run_at(
        self,
        source: Source,
        rate: float,
        seed: int,
        limits: Limits,
        measure: MeasurePart,
        show: Callable[[str], None],
    ) -> tuple[float, list[Row], dict[str, Any]]:
        bench, config = self.bench, self.config
        if bench.fails_after is not None and len(bench.measured) >= bench.fails_after:
            raise KeyboardInterrupt
        bench.measured.append((config.router.policy, rate, seed))
        duration_s, knee = window_s(measure, rate), bench.knee(config)
        count, good_share = round(rate * duration_s), min(1.0, max(0.0, 2 - rate / knee))
        good = round(count * good_share)
        rows = [
            Row(index / rate, index / rate, 64, 2, Status.COMPLETE, first_s, first_s + 0.001)
            for index in range(count)
            for first_s in [bench.ttft_s if index < good else 1000.0]
        ]
        judged = judge(rows, Slo.fixed(limits.ttft_s, limits.tpot_s), duration_s)
        said = {
            **judged.to_json(),
            "stages_s": {"prefill": 0.1, "decode": 0.2},
            "counted": {"admission.accepted.none": count - 2, "admission.rejected.late": 2,
                        "could_have_served": 1},
            "client": {},
        }  # fmt: skip
        return duration_s, rows, said


def quiet() -> Teller:
    return Teller(lambda share, said: None, lambda said: None)
