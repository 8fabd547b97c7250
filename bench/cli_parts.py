"""What commands of `prelay bench` have in common."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


def need_matplotlib(plot: Path | None) -> None:
    """Raises click.UsageError if it is not installed, or the plot's directory is not there."""
    if plot is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError("--plot needs matplotlib: pip install 'prelay[bench]'")
    need_directory("--plot", plot)


def need_directory(flag: str, target: Path | None) -> None:
    """Raises click.UsageError if the file that is to be written has no directory."""
    if target is not None and not target.absolute().parent.is_dir():
        raise click.UsageError(f"{flag} {target}: there is no directory {target.absolute().parent}")


@contextmanager
def progress(title: str) -> Iterator[Callable[[float, str], None]]:
    """A bar on standard error; nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.fields[what]}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=1.0, what=title)
        yield lambda done, what: bar.update(task, completed=done, what=f"{title}: {what}")


def milliseconds(found: Mapping[str, float] | None) -> str:
    """p50 / p90 / p99 of seconds, in ms; - of nothing."""
    if found is None:
        return "-"
    return " / ".join(_ms(found[name]) for name in ("p50", "p90", "p99"))


def _ms(seconds: float) -> str:
    """Three digits, or all before the point."""
    return f"{seconds * 1000:.0f}" if seconds >= 0.1 else f"{seconds * 1000:.3g}"
