"""What of a workload is refused.

BadInputError           a trace, a dataset, an SLO or a rate that cannot be used
└── TraceError          a row of a trace
"""

from __future__ import annotations

from pathlib import Path


class BadInputError(ValueError):
    """What was asked for makes no sense; the message says which value, and what is expected."""


class TraceError(BadInputError):
    """A row of a file that cannot be used."""

    def __init__(self, path: Path, line: int, column: str, value: object, expected: str) -> None:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        super().__init__(f"{path}, line {line}, {column}: {shown}; expected {expected}")
