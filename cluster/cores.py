"""Which cores a rank runs on: one of its own for each of its threads, while there are enough."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CoreShare:
    """cores: what a rank is pinned to. shared: whether there are fewer cores than slots."""

    cores: tuple[int, ...]
    shared: bool


def share_cores(allowed: Sequence[int], first_slot: int, threads: int, slots: int) -> CoreShare:
    """The cores for slots first_slot .. first_slot + threads - 1 of all `slots` on a node.

    allowed: the cores that the node lets its processes use. Slots beyond their number start again from the
    first core.
    """
    wanted = [allowed[slot % len(allowed)] for slot in range(first_slot, first_slot + threads)]
    return CoreShare(tuple(sorted(set(wanted))), shared=slots > len(allowed))


def pin_process(cores: Sequence[int]) -> None:
    """Bind every thread of this process to `cores`; threads started later inherit that."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
            os.sched_setaffinity(int(task.name), cores)
