"""Processes that only simulate: which commands these are, and how they begin."""

from __future__ import annotations

from collections.abc import Sequence

from engine import cores
from router import garbage


def simulates(arguments: Sequence[str]) -> bool:
    """Whether that command simulates, and does nothing else."""
    match arguments:
        case ["simulate" | "plan" | "simulator" | "controller", *_]:
            return True
        case ["goodput", *options]:
            return any(option.partition("=")[0] == "--simulate" for option in options)
    return False


def begin() -> None:
    """Before anybody imports a core."""
    cores.use_compiled()
    garbage.settle()
