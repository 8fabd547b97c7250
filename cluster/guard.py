"""The process that a user starts, signals and sees: it stands guard over the deployment, to the end.

The deployment runs in a child process with a session of its own (`child.py`), so that Ctrl-C in the
terminal reaches the guard alone. What the guard promises:

- SIGINT, SIGTERM or SIGHUP: the child is asked to stop, by the end of its standard input. After `grace_s`, or
  at another signal a moment later, all that descends from the guard is killed. That holds at any moment,
  also while Ray is half started.
- The child ends or is killed: whatever it has left behind is killed too.
- The guard itself is killed: that ends the child's standard input as well.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.process_tree import become_subreaper, kill_descendants, reap

GRACE_S = 8.5
"""How long a stop may take before it is forced: with the kill, everything is gone within 10 s."""

ECHO_S = 0.5
"""Signals within this time are one wish to stop: terminals and `timeout` send several for one."""

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_guarded(
    command: Sequence[str],
    order: bytes,
    environment: Mapping[str, str],
    grace_s: float = GRACE_S,
    echo_s: float = ECHO_S,
) -> int:
    """Run `command` with `order` as the first line of its input until it ends; returns the exit code.

    The command's last argument will be a directory for its files, which is removed afterwards unless
    something failed.
    """
    # Blocked signals wait for sigtimedwait below, so there is no moment at which one could be missed.
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_STOP_SIGNALS, signal.SIGCHLD})
    become_subreaper()
    # Not under $TMPDIR: Ray puts sockets there, and their paths must stay below 108 characters.
    run_directory = Path(tempfile.mkdtemp(prefix="prelay-", dir="/tmp"))
    # The write end stays open, and in no other process, for as long as the guard lives.
    read_end, write_end = os.pipe()
    pid = os.posix_spawn(
        command[0],
        [*command, str(run_directory)],
        environment,
        file_actions=[(os.POSIX_SPAWN_DUP2, read_end, 0)],
        setsid=True,
        setsigmask=[],
    )
    os.close(read_end)
    with contextlib.suppress(BrokenPipeError):  # it may have ended already, which the watch will see
        os.write(write_end, order + b"\n")
    status, asked = _watch(pid, write_end, grace_s, echo_s)
    left_nothing = kill_descendants(timeout_s=1.5)
    return _exit_code(status, asked, left_nothing, run_directory)


def _watch(pid: int, leash: int, grace_s: float, echo_s: float) -> tuple[int | None, bool]:
    """The child's wait status (None: still running, to be killed) and whether it was asked to stop."""
    statuses: dict[int, int] = {}
    deadline: float | None = None
    echo_end = 0.0
    while True:
        timeout_s = 3600.0 if deadline is None else max(deadline - time.monotonic(), 0.0)
        received = signal.sigtimedwait({*_STOP_SIGNALS, signal.SIGCHLD}, timeout_s)
        reap(statuses.__setitem__)
        if pid in statuses:
            return statuses[pid], deadline is not None
        if received is not None and received.si_signo in _STOP_SIGNALS:
            now = time.monotonic()
            if deadline is not None and now < echo_end:
                continue
            if deadline is not None:
                print("prelay: asked a second time: killing what is left", file=sys.stderr)
                return None, True
            deadline, echo_end = now + grace_s, now + echo_s
            os.close(leash)
        elif deadline is not None and time.monotonic() >= deadline:
            print("prelay: stopping takes too long: killing what is left", file=sys.stderr)
            return None, True


def _exit_code(status: int | None, asked: bool, left_nothing: bool, run_directory: Path) -> int:
    code = 1 if status is None else os.waitstatus_to_exitcode(status)
    if code < 0:
        name = signal.Signals(-code).name
        _complain(
            f"the process that ran the deployment was ended by {name}, and so was all that it had started"
        )
        code = 1
    if not left_nothing:
        _complain("some processes could not be killed: see `ps`")
        code = 1
    if code == 1 and not asked and any(run_directory.glob("session_*")):
        print(f"prelay: the logs of Ray and the workers are kept in {run_directory}", file=sys.stderr)
    else:
        shutil.rmtree(run_directory, ignore_errors=True)
    return code


def _complain(message: str) -> None:
    print(f"prelay: error: {message}", file=sys.stderr)
