"""The guard ends all that descends from it, whichever is asked or killed. No Ray here: small stand-ins.

Every process of a tree inherits the write end of one pipe: the end of that pipe is the end of the last one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

GUARD = """
    import os, sys
    from cluster.guard import run_guarded
    command = [sys.executable, "-c", sys.argv[1], sys.argv[2]]
    grace_s, echo_s = float(sys.argv[3]), float(sys.argv[4])
    sys.exit(run_guarded(command, b"the order", dict(os.environ), grace_s, echo_s))
"""
LEAVE_A_DAEMON = """
    import os, signal, subprocess, sys
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            signal.pause()
        os._exit(0)
    os.wait()
"""
SAY_READY = """
    os.write(int(sys.argv[1]), b"%d\\n" % os.getpid())
"""
OBEY = """
    sys.stdin.read()
"""
IGNORE = """
    while True:
        signal.pause()
"""
SAY_WHEN_ASKED = """
    sys.stdin.read()
    os.write(int(sys.argv[1]), b"asked\\n")
"""
AND_LINGER = """
    for _ in range(20):
        os.sched_yield()
        signal.sigtimedwait([signal.SIGUSR1], 0.01)
"""
SAY_WHEN_INPUT_ENDS = """
    import os, sys
    os.write(int(sys.argv[1]), sys.stdin.readline().encode())
    rest = sys.stdin.read().encode()
    os.rmdir(sys.argv[2])
    os.write(int(sys.argv[1]), b"ended" + rest + b"\\n")
"""


@dataclass(frozen=True)
class Tree:
    """A running guard with its child. read_line: what the child said."""

    guard: subprocess.Popen[str]
    read_line: Callable[[], str]

    def all_gone(self) -> bool:
        """Blocks until the last process of the tree has ended."""
        return self.read_line() == ""


@pytest.fixture
def start() -> Iterator[Callable[..., Tree]]:
    guards, pipes = [], []

    def start_tree(*script: str, grace_s: float = 20.0, echo_s: float = 0.0) -> Tree:
        read_end, write_end = os.pipe()
        code = "".join(textwrap.dedent(part) for part in script)
        guard = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(GUARD), code, str(write_end), str(grace_s), str(echo_s)],
            pass_fds=[write_end],
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(write_end)
        guards.append(guard)
        pipes.append(os.fdopen(read_end))
        return Tree(guard, pipes[-1].readline)

    yield start_tree
    for guard in guards:
        guard.kill()
        guard.communicate()
    for pipe in pipes:
        pipe.close()


def test_the_childs_exit_code_is_the_guards(start: Callable[..., Tree]) -> None:
    tree = start(LEAVE_A_DAEMON, "import sys; sys.exit(3)")
    assert tree.all_gone()
    assert tree.guard.wait() == 3


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_asks_the_child_and_ends_what_it_leaves(
    start: Callable[..., Tree], signum: signal.Signals
) -> None:
    tree = start(LEAVE_A_DAEMON, SAY_READY, OBEY)
    tree.read_line()
    tree.guard.send_signal(signum)
    assert tree.all_gone()
    assert tree.guard.wait() == 0


def test_a_child_that_does_not_stop_is_killed(start: Callable[..., Tree]) -> None:
    tree = start(LEAVE_A_DAEMON, SAY_READY, IGNORE, grace_s=0.1)
    tree.read_line()
    tree.guard.send_signal(signal.SIGTERM)
    assert tree.all_gone()
    assert tree.guard.wait() == 1


def test_a_second_signal_kills_at_once(start: Callable[..., Tree]) -> None:
    tree = start(LEAVE_A_DAEMON, SAY_READY, SAY_WHEN_ASKED, IGNORE)
    tree.read_line()
    tree.guard.send_signal(signal.SIGINT)
    assert tree.read_line() == "asked\n"
    tree.guard.send_signal(signal.SIGINT)
    assert tree.all_gone()
    assert tree.guard.wait() == 1


def test_several_signals_for_one_wish_to_stop_are_one(start: Callable[..., Tree]) -> None:
    tree = start(LEAVE_A_DAEMON, SAY_READY, SAY_WHEN_ASKED, AND_LINGER, echo_s=60.0)
    tree.read_line()
    tree.guard.send_signal(signal.SIGINT)
    assert tree.read_line() == "asked\n"
    tree.guard.send_signal(signal.SIGTERM)
    assert tree.all_gone()
    assert tree.guard.wait() == 0


def test_a_killed_child_takes_everything_with_it(start: Callable[..., Tree]) -> None:
    tree = start(LEAVE_A_DAEMON, SAY_READY, OBEY)
    os.kill(int(tree.read_line()), signal.SIGKILL)
    assert tree.all_gone()
    assert tree.guard.wait() == 1
    assert tree.guard.stderr is not None
    assert "SIGKILL" in tree.guard.stderr.read()


def test_the_child_gets_its_order_and_notices_the_end_of_the_guard(start: Callable[..., Tree]) -> None:
    tree = start(SAY_WHEN_INPUT_ENDS)
    assert tree.read_line() == "the order\n"
    tree.guard.kill()
    assert tree.read_line() == "ended\n"
    assert tree.all_gone()


def test_the_run_directory_goes_with_the_guard(start: Callable[..., Tree]) -> None:
    tree = start("import os, sys; os.write(int(sys.argv[1]), sys.argv[2].encode() + b'\\n')")
    directory = Path(tree.read_line().strip())
    assert tree.guard.wait() == 0
    assert not directory.exists()
