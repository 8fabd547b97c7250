"""Ending every process that descends from this one, whoever started it and however it was cut off.

A process that calls `become_subreaper` inherits the orphans among its descendants (Linux; otherwise init
does), so its children, seen recursively, are exactly what it and its helpers have started and what has not
ended yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """Adopt descendants whose parent dies. Raises OSError where the kernel does not know how (not Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`, parents before their children; zombies included."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                # "pid (command) state ppid ...": the command may hold blanks and parentheses.
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                children[int(fields[1])].append(int(entry.name))
    found = []
    waiting = [pid]
    while waiting:
        below = children[waiting.pop()]
        found += below
        waiting += below
    return found


def kill_descendants(
    timeout_s: float, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> bool:
    """SIGKILL everything below this process and wait until it is gone. Only for a subreaper.

    Returns whether nothing is left; after `timeout_s` (a process may hang inside the kernel) it gives up.
    """
    deadline = clock() + timeout_s
    while True:
        # Again and again: a process may have forked between being listed and being killed.
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not reap():
            return True
        if clock() >= deadline:
            return False
        sleep(0.01)


def reap(on_exit: Callable[[int, int], None] = lambda pid, status: None) -> bool:
    """Collect children that have ended, telling `on_exit` pid and wait status; whether others are left."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True
        on_exit(pid, status)


async def end_of_child(name: str) -> str:
    """Wait for the end of the process of this name that this process has started; returns the name."""
    pids = (pid for pid in descendants(os.getpid()) if _name_of(pid) == name)
    if (pid := next(pids, None)) is None:
        return name
    process = os.pidfd_open(pid)
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(process, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(process)
        os.close(process)
    return name


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:  # it has just ended
        return ""
