"""Readers of the traces that the field uses. A file that is wrong anywhere is refused as a whole.

    Azure       CSV   TIMESTAMP, ContextTokens, GeneratedTokens      Splitwise (Patel et al. 2024)
    Mooncake    JSONL timestamp, input_length, output_length, hash_ids          (Qin et al. 2025)
    lengths     CSV   num_prefill_tokens, num_decode_tokens      Sarathi-Serve (Agrawal et al. 2024)
    plain       CSV   arrival_s, prompt_tokens, output_tokens

Columns beyond these are ignored.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster.workload.errors import BadInputError, TraceError

MOONCAKE_BLOCK = 512
"""Tokens that each of Mooncake's hash_ids stands for."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    """arrival_s: since the first row; 0 in a trace without arrivals. hash_ids: of the prompt's blocks of
    MOONCAKE_BLOCK tokens, the last of which may be shorter; equal ids at the beginning are an equal
    prefix."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """timed: it has arrivals. coarse: many rows share a time, and came somewhere until the next one."""

    rows: Sequence[TraceRow]
    timed: bool
    coarse: bool = False


def read_trace(path: Path) -> Trace:
    """Tells the format by the file's beginning. Raises BadInputError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadInputError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from error
    if text.lstrip().startswith("{"):
        rows = _ordered(path, "timestamp", _mooncake_rows(path, text))
        trace = Trace(rows, timed=True, coarse=True)
    else:
        trace = _read_csv(path, text)
    if not trace.rows:
        raise BadInputError(f"{path} has no rows")
    return trace


@dataclass(frozen=True, slots=True)
class _Format:
    """The columns of a CSV; arrival: None if it has none, else its name and how it becomes seconds."""

    prompt: str
    output: str
    arrival: tuple[str, Callable[[str], float], str] | None

    @property
    def columns(self) -> list[str]:
        return [*([self.arrival[0]] if self.arrival else []), self.prompt, self.output]


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError
    return value


_FORMATS = (
    _Format(
        "ContextTokens",
        "GeneratedTokens",
        ("TIMESTAMP", lambda text: datetime.fromisoformat(text).timestamp(), "a date and a time"),
    ),
    _Format("num_prefill_tokens", "num_decode_tokens", None),
    _Format("prompt_tokens", "output_tokens", ("arrival_s", _seconds, "seconds, 0 or more")),
)


def _read_csv(path: Path, text: str) -> Trace:
    lines = csv.reader(text.splitlines())
    try:
        header = [name.strip() for name in next(lines, [])]
        form = next((form for form in _FORMATS if set(form.columns) <= set(header)), None)
        if form is None:
            known = "; ".join(", ".join(form.columns) for form in _FORMATS)
            raise BadInputError(
                f"{path}, line 1: the columns {', '.join(header) or '(none)'} are those of no trace that is "
                f"known: {known}; or one JSON object a line (Mooncake)"
            )
        column = form.arrival[0] if form.arrival else ""
        numbered = (
            (lines.line_num, _csv_row(path, form, header, lines.line_num, cells)) for cells in lines if cells
        )
        return Trace(_ordered(path, column, numbered), timed=form.arrival is not None)
    except csv.Error as error:
        raise BadInputError(f"{path}, line {lines.line_num}: {error}") from error


def _csv_row(path: Path, form: _Format, header: Sequence[str], line: int, cells: Sequence[str]) -> TraceRow:
    if len(cells) != len(header):
        raise TraceError(path, line, f"all {len(cells)} columns", ",".join(cells), f"{len(header)} columns")
    values = dict(zip(header, cells, strict=True))
    arrival_s = 0.0
    if form.arrival is not None:
        name, parse, expected = form.arrival
        try:
            arrival_s = parse(values[name].strip())
        except ValueError as error:
            raise TraceError(path, line, name, values[name], expected) from error
    return TraceRow(
        arrival_s,
        _count(path, line, form.prompt, values[form.prompt].strip()),
        _count(path, line, form.output, values[form.output].strip()),
    )


def _count(path: Path, line: int, column: str, value: str) -> int:
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise TraceError(path, line, column, value, "a whole number of at least 1")
    return int(value)


def _mooncake_rows(path: Path, text: str) -> Iterator[tuple[int, TraceRow]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TraceError(path, number, "the whole line", line, f"a JSON object ({error})") from error
        if not isinstance(row, dict):
            raise TraceError(path, number, "the whole line", line, "a JSON object")
        milliseconds = _whole(path, number, row, "timestamp", 0)
        prompt_tokens = _whole(path, number, row, "input_length", 1)
        output_tokens = _whole(path, number, row, "output_length", 1)
        ids, num_blocks = row.get("hash_ids"), -(-prompt_tokens // MOONCAKE_BLOCK)
        if (
            not isinstance(ids, list)
            or len(ids) != num_blocks
            or not all(isinstance(one, int) and one >= 0 for one in ids)
        ):
            raise TraceError(
                path,
                number,
                "hash_ids",
                ids,
                f"{num_blocks} ids, one for each {MOONCAKE_BLOCK} tokens of input",
            )
        yield number, TraceRow(milliseconds / 1000, prompt_tokens, output_tokens, tuple(ids))


def _whole(path: Path, line: int, row: Mapping[str, Any], column: str, least: int) -> int:
    value = row.get(column)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise TraceError(path, line, column, value, f"a whole number of at least {least}")
    return value


def _ordered(path: Path, column: str, numbered: Iterable[tuple[int, TraceRow]]) -> list[TraceRow]:
    """The rows with the first one's arrival as 0. numbered: with the line that each stands in."""
    rows: list[TraceRow] = []
    for line, row in numbered:
        if rows and row.arrival_s < rows[-1].arrival_s:
            early_s = rows[-1].arrival_s - row.arrival_s
            raise TraceError(
                path, line, column, f"{early_s:g} s before the row above", "rows in the order of arrival"
            )
        rows.append(row)
    start_s = rows[0].arrival_s if rows else 0.0
    return [replace(row, arrival_s=row.arrival_s - start_s) for row in rows]
