"""What commands of `prelay bench` have in common."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import platform
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from bench.goodput.teller import Teller


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


def names_of(text: str | None) -> list[str] | None:
    """Of a comma-separated list; None where nothing was given."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


@contextmanager
def telling(title: str) -> Iterator[Teller]:
    """A bar on standard error, below a line for each point; where that is no terminal, only the lines."""
    from bench.goodput.teller import Teller

    console = Console(stderr=True)
    columns = (BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.fields[what]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=1.0, what="checking the experiment")
        yield Teller(
            lambda share, what: bar.update(task, completed=share, what=what),
            lambda said: console.print(said, markup=False, highlight=False, soft_wrap=True),
        )


def about_machine() -> dict[str, str]:
    """What figures depend on, besides what was asked for."""
    from bench.profile import cpu_name

    return {
        "machine": cpu_name(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("prelay", "torch")},
    }


def kept_in(target: Path) -> str:
    """What to say of a record of measurements."""
    if not target.exists():
        return "nothing was measured"
    return f"what was measured is kept in {target}; --resume {target} goes on from there"


def raise_file_limit() -> None:
    """Each request that is under way may have a socket."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def end_on_sigterm() -> None:
    """Ended otherwise than by Ctrl-C, too, the running task stops what it has started."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


def wide_console() -> Console:
    """For wide tables: a pipe has no width to respect."""
    return Console(width=None if sys.stdout.isatty() else 160)
