"""Which cores a worker gets."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cluster.cores import CoreShare, share_cores


@pytest.mark.parametrize(
    ("first_slot", "threads", "slots", "expected"),
    [
        (0, 1, 2, CoreShare((3,), shared=False)),
        (1, 1, 2, CoreShare((5,), shared=False)),
        (1, 2, 3, CoreShare((5, 7), shared=False)),
        (3, 1, 4, CoreShare((3,), shared=True)),
        (2, 2, 4, CoreShare((3, 7), shared=True)),
        (0, 5, 5, CoreShare((3, 5, 7), shared=True)),
    ],
)
def test_slots_go_over_the_allowed_cores_and_wrap_round(
    first_slot: int, threads: int, slots: int, expected: CoreShare
) -> None:
    assert share_cores([3, 5, 7], first_slot, threads, slots) == expected


def test_all_threads_of_a_process_are_pinned() -> None:
    script = """
import os, threading
from cluster.cores import pin_process
core = min(os.sched_getaffinity(0))
pinned, seen = threading.Event(), []
def look():
    pinned.wait()
    seen.append(os.sched_getaffinity(0))
thread = threading.Thread(target=look)
thread.start()
pin_process([core])
pinned.set()
thread.join()
assert seen == [{core}] == [os.sched_getaffinity(0)], seen
"""
    subprocess.run([sys.executable, "-c", script], check=True)
