"""What a person sees of a deployment: progress while it starts, one line per event afterwards."""

from __future__ import annotations

import contextlib
import logging
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Reporter(Protocol):
    """Told by the launcher what happens."""

    def progress(self, what: str, stage: str, fraction: float | None) -> None:
        """`what` (ray, router, a worker) has come this `fraction` of its way; None: nobody knows."""

    def event(self, line: str) -> None:
        """Something happened that is worth a line."""

    def close(self) -> None:
        """The deployment is up, or has failed: no progress is shown any more, only events."""


class LineReporter:
    """For logs and pipes: a line for each new stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stages: dict[str, str] = {}
        self._closed = False

    def progress(self, what: str, stage: str, fraction: float | None) -> None:
        if not self._closed and self._stages.get(what) != stage:
            self._stages[what] = stage
            self.event(f"{what}: {stage}")

    def event(self, line: str) -> None:
        _say(self._console, line)

    def close(self) -> None:
        self._closed = True


class BarReporter:
    """For terminals: a bar for each part, in place; events scroll by above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._closed = False
        self._bars = Progress(
            TextColumn("{task.fields[what]:<10}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description:<32}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )

    def progress(self, what: str, stage: str, fraction: float | None) -> None:
        if self._closed:
            return
        self._bars.start()
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(stage, total=None, what=what)
        total = None if fraction is None else 1.0
        self._bars.update(self._tasks[what], description=stage, completed=fraction, total=total)

    def event(self, line: str) -> None:
        _say(self._console, line)

    def close(self) -> None:
        self._closed = True
        self._bars.stop()


class KeptReporter:
    """For somebody elsewhere who asks from time to time what there is to report: `lines` and the log have the
    events, `stages` how far each part has come."""

    def __init__(self, log: logging.Logger) -> None:
        self.lines: list[str] = []
        self.stages: dict[str, tuple[str, float | None]] = {}
        self._log = log
        self._closed = False

    def progress(self, what: str, stage: str, fraction: float | None) -> None:
        if not self._closed:
            self.stages[what] = stage, fraction

    def event(self, line: str) -> None:
        if not self._closed:
            self.lines.append(line)
        self._log.info("%s", line)

    def close(self) -> None:
        self._closed = True


def _say(console: Console, line: str) -> None:
    # A disk that is full, or a terminal that is gone, is no reason to end what serves.
    with contextlib.suppress(OSError):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def reporter_for(console: Console) -> Reporter:
    """Bars where they can be drawn, lines elsewhere."""
    drawable = console.is_terminal and not console.is_dumb_terminal
    return BarReporter(console) if drawable else LineReporter(console)
