"""Changes of a deployment under load, as its clients see them: an open loop, and `prelay role ...` in the
midst of it.

Requests are judged by when they arrived: before the first change, while something was being changed, or
after.
"""

from __future__ import annotations

import asyncio
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.errors import MeasurementError
from bench.load.idle import check_possible, measure_idle, probe_answer, probe_lengths
from bench.load.run import run_load
from bench.load.serve import ServePlan, vocabulary_of
from bench.load.target import Target
from cluster.cli_change import COMMANDS
from cluster.workload.drawing import workload
from cluster.workload.errors import BadInputError
from cluster.workload.jobs import Row
from cluster.workload.judge import Outcome, judge, outcome_of
from cluster.workload.slo import Slo

_WINDOW_S = 5.0
_IDLE_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Change:
    """A command of `prelay` and when to give it, seconds after the load has begun."""

    at_s: float
    words: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Change:
        """SECONDS:COMMAND, as in 20:role decode-0 mixed. Raises BadInputError."""
        at, _, command = text.partition(":")
        known = [one.name for one in COMMANDS]
        try:
            at_s, words = float(at), tuple(shlex.split(command))
        except ValueError:
            at_s, words = -1.0, ()
        if not 0 <= at_s < float("inf") or not words or words[0] not in known:
            raise BadInputError(
                f"--at {text!r}: write it as SECONDS:COMMAND, as in '20:role decode-0 mixed'; commands are "
                f"{', '.join(str(name) for name in known)}"
            )
        return cls(at_s, words)

    def __str__(self) -> str:
        return " ".join(self.words)


@dataclass(slots=True)
class Made:
    """A change that was made. lines: what the command wrote, with the second at which it came."""

    change: Change
    began_s: float
    ended_s: float = 0.0
    code: int = 0
    lines: list[tuple[float, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Changed:
    """What came of it. rows: of all requests, in the order of their arrival."""

    slo: Slo
    rows: Sequence[Row]
    made: Sequence[Made]
    duration_s: float

    def phases(self) -> dict[str, tuple[float, float]]:
        """Seconds from when to when; `during` begins with the first change and ends with the last."""
        begin, end = self.made[0].began_s, max(one.ended_s for one in self.made)
        spans = {"before": (0.0, begin), "during": (begin, end), "after": (end, self.duration_s)}
        return {name: (first, last) for name, (first, last) in spans.items() if last > first}

    def curve(self) -> list[tuple[float, float, float]]:
        """(second, good requests/s, attainment) of those that arrived in the 5 s up to then; attainment is 1
        where there were none."""
        good = [(row.arrival_s, outcome_of(row, self.slo) is Outcome.GOOD) for row in self.rows]
        points = []
        for second in range(int(_WINDOW_S), int(self.duration_s) + 1):
            window = [one for arrival_s, one in good if second - _WINDOW_S <= arrival_s < second]
            share = sum(window) / len(window) if window else 1.0
            points.append((float(second), sum(window) / _WINDOW_S, share))
        return points

    def to_json(self) -> dict[str, Any]:
        """What --json prints."""
        judged = {
            name: judge([row for row in self.rows if first <= row.arrival_s < last], self.slo, last - first)
            for name, (first, last) in self.phases().items()
        }
        return {
            "slo": self.slo.to_json(),
            "duration_s": self.duration_s,
            "changes": [
                {
                    "command": str(one.change),
                    "began_s": one.began_s,
                    "ended_s": one.ended_s,
                    "exit_code": one.code,
                    "lines": one.lines,
                }
                for one in self.made
            ],
            "phases": {name: found.to_json() for name, found in judged.items()},
            "curve": self.curve(),
        }


async def measure_change(
    target: Target,
    plan: ServePlan,
    changes: Sequence[Change],
    admin: str,
    tls: Path | None,
    show: Callable[[float, str], None],
    on_line: Callable[[str], None],
) -> Changed:
    """plan: one rate, one seed, a duration. on_line: told what commands write, as they do. Raises
    BadInputError, MeasurementError: also if a command fails, with the load brought to its end before."""
    assert plan.duration_s is not None
    info = await target.check()
    spec = replace(plan.spec, vocabulary=vocabulary_of(plan.vocab_size or info.vocab_size))
    jobs = workload(spec, 0, plan.rates[0], duration_s=plan.duration_s)
    if not jobs:
        raise BadInputError(f"no request arrives within {plan.duration_s:g} s; measure for longer")
    idle = await measure_idle(
        target, probe_lengths(jobs), probe_answer(jobs), spec.vocabulary, spec.salt, _IDLE_REPEATS,
        lambda done, said: show(0.0, said),
    )  # fmt: skip
    check_possible(plan.slo, idle)
    slo = plan.slo.with_idle(idle)
    began = time.perf_counter()

    async def make_all() -> list[Made]:
        return [await _make(change, admin, tls, began, on_line) for change in changes]

    making = asyncio.create_task(make_all())
    try:
        rows = await run_load(target, jobs, slo, show, timeout_s=plan.timeout_s, send_slo=plan.send_slo)
        made = await making
    finally:
        making.cancel()
    for one in made:
        if one.code:
            said = one.lines[-1][1] if one.lines else "it said nothing"
            raise MeasurementError(f"`prelay {one.change}` ended with exit code {one.code}: {said}")
    return Changed(slo, rows, made, max(plan.duration_s, *(one.ended_s for one in made)))


async def _make(
    change: Change, admin: str, tls: Path | None, began: float, on_line: Callable[[str], None]
) -> Made:
    await asyncio.sleep(began + change.at_s - time.perf_counter())
    secured = () if tls is None else ("--tls", str(tls))
    made = Made(change, time.perf_counter() - began)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "cluster.cli", *change.words, "--admin", admin, *secured,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async for raw in process.stdout:
            line = raw.decode(errors="replace").rstrip()
            made.lines.append((time.perf_counter() - began, line))
            on_line(line)
        made.code = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    made.ended_s = time.perf_counter() - began
    return made
