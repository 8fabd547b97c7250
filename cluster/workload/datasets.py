"""What prompts and answers are like: lengths, shared prefixes, and when they come if a trace says so.

synthetic:prompt=512,answer=64      lengths as given; `128-1024` draws one of these each time
sharegpt:FILE                       lengths of a file, drawn at random
trace:FILE                          lengths, and arrivals where it has them, row after row
mix:FILE,FILE,period=60             two traces whose shares swing from one to the other and back
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from cluster.workload.arrivals import Times
from cluster.workload.errors import BadInputError
from cluster.workload.traces import MOONCAKE_BLOCK, TraceRow, read_trace


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a request. hash_ids: the blocks of `block_tokens` tokens that its prompt consists of, if it may
    share its beginning with others."""

    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    block_tokens: float = MOONCAKE_BLOCK


class Dataset(Protocol):
    """Where shapes come from."""

    @property
    def left_out(self) -> int:
        """Rows that were too long."""

    def shapes(self, rng: np.random.Generator, arrivals: Times) -> Sequence[Shape]:
        """One for each arrival."""


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Lengths drawn evenly from a range each, ends included; nothing is shared."""

    prompt: tuple[int, int]
    answer: tuple[int, int]
    left_out: int = 0

    def shapes(self, rng: np.random.Generator, arrivals: Times) -> Sequence[Shape]:
        prompts = rng.integers(self.prompt[0], self.prompt[1], size=len(arrivals), endpoint=True)
        answers = rng.integers(self.answer[0], self.answer[1], size=len(arrivals), endpoint=True)
        return [Shape(int(prompt), int(answer)) for prompt, answer in zip(prompts, answers, strict=True)]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Shapes in no order: drawn at random, each time anew."""

    pool: Sequence[Shape]
    left_out: int = 0

    def shapes(self, rng: np.random.Generator, arrivals: Times) -> Sequence[Shape]:
        return [self.pool[index] for index in rng.integers(len(self.pool), size=len(arrivals))]


@dataclass(frozen=True, slots=True)
class TimedRows:
    """Shapes in the order of their arrival, taken one after the other from a random place on; the end is
    followed by the beginning. coarse: as in Trace."""

    pool: Sequence[Shape]
    arrivals_s: Sequence[float]
    coarse: bool = False
    left_out: int = 0

    def shapes(self, rng: np.random.Generator, arrivals: Times) -> Sequence[Shape]:
        return self._from(int(rng.integers(len(self.pool))), len(arrivals))

    def exactly(
        self, rng: np.random.Generator, count: int, duration_s: float
    ) -> tuple[Times, Sequence[Shape]]:
        """`count` rows with their own arrivals, stretched so that the next one would come after
        `duration_s`."""
        start = int(rng.integers(len(self.pool)))
        times = self._times(rng, start, count + 1)
        if times[-1] <= 0:
            raise BadInputError(f"{count} rows of the trace arrive at one moment: they have no pace to scale")
        return times[:-1] / times[-1] * duration_s, self._from(start, count)

    def during(
        self, rng: np.random.Generator, duration_s: float, time_scale: float
    ) -> tuple[Times, Sequence[Shape]]:
        """The rows of duration_s seconds; one second of the trace takes time_scale seconds."""
        start = int(rng.integers(len(self.pool)))
        if self._round_s * time_scale <= 0:
            raise BadInputError(
                "all rows of the trace arrive at one moment; give a --rate and other arrivals"
            )
        count = len(self.pool) * (1 + math.ceil(duration_s / (self._round_s * time_scale)))
        times: Times = self._times(rng, start, count) * time_scale
        times = times[times < duration_s]
        return times, self._from(start, len(times))

    def whole(self, rng: np.random.Generator, time_scale: float) -> tuple[Times, Sequence[Shape]]:
        """All rows, once, from the first to the last."""
        return self._times(rng, 0, len(self.pool)) * time_scale, self.pool

    @property
    def _round_s(self) -> float:
        """From the first row to its return: the span, and a gap as long as others are."""
        own = np.asarray(self.arrivals_s, dtype=np.float64)
        return float(own[-1] - own[0]) + _usual_gap_s(np.unique(own) if self.coarse else own)

    def _from(self, start: int, count: int) -> Sequence[Shape]:
        return [self.pool[(start + index) % len(self.pool)] for index in range(count)]

    def _times(self, rng: np.random.Generator, start: int, count: int) -> Times:
        """Of `count` rows from `start` on, the first at 0."""
        at = np.arange(start, start + count)
        own = np.asarray(self.arrivals_s, dtype=np.float64)
        if self.coarse:
            own = _spread(rng, own)
        times: Times = own[at % len(own)] + at // len(own) * self._round_s
        times -= times[0]
        return times


@dataclass(frozen=True, slots=True)
class Mix:
    """The share of `second` goes from none to all and back, once in period_s; each keeps its own order."""

    first: Dataset
    second: Dataset
    period_s: float

    @property
    def left_out(self) -> int:
        return self.first.left_out + self.second.left_out

    def shapes(self, rng: np.random.Generator, arrivals: Times) -> Sequence[Shape]:
        share = (1 - np.cos(2 * np.pi * arrivals / self.period_s)) / 2
        of_second = rng.random(len(arrivals)) < share
        from_first = iter(self.first.shapes(rng, arrivals[~of_second]))
        from_second = iter(self.second.shapes(rng, arrivals[of_second]))
        return [next(from_second if chosen else from_first) for chosen in of_second]


def load_dataset(text: str, length_scale: float = 1.0, max_tokens: int | None = None) -> Dataset:
    """What a text in the form above means. length_scale: of prompts and answers. max_tokens: rows with more,
    prompt and answer together after scaling, are left out.

    Raises BadInputError.
    """
    kind, _, rest = text.partition(":")
    match kind:
        case "synthetic":
            return _synthetic(text, rest, length_scale, max_tokens)
        case "sharegpt" if rest:
            rows = _rows(Path(rest), length_scale, max_tokens)
            return Lengths(rows.pool, rows.left_out)
        case "trace" if rest:
            return _trace(Path(rest), length_scale, max_tokens)
        case "mix":
            match = re.fullmatch(r"([^,]+),([^,]+),period=(\d+(?:\.\d+)?)", rest)
            if match is None or float(match[3]) == 0:
                raise BadInputError(f"--dataset {text!r}: write it as mix:FILE,FILE,period=SECONDS")
            first, second = (_trace(Path(name), length_scale, max_tokens) for name in (match[1], match[2]))
            return Mix(first, second, float(match[3]))
    raise BadInputError(
        f"--dataset {text!r}: there are synthetic:prompt=N,answer=N, sharegpt:FILE, trace:FILE and "
        f"mix:FILE,FILE,period=SECONDS"
    )


def _synthetic(text: str, rest: str, length_scale: float, max_tokens: int | None) -> Synthetic:
    ranges: dict[str, tuple[int, int]] = {}
    for part in rest.split(","):
        match = re.fullmatch(r"(prompt|answer)=(\d+)(?:-(\d+))?", part.strip())
        if match is None or match[1] in ranges:
            raise BadInputError(
                f"--dataset {text!r}: write it as synthetic:prompt=512,answer=64 or prompt=128-1024"
            )
        low, high = int(match[2]), int(match[3] or match[2])
        if not 0 < low <= high:
            raise BadInputError(f"--dataset {text!r}: {part!r} must be at least 1, the smaller number first")
        ranges[match[1]] = (_scaled(low, length_scale), _scaled(high, length_scale))
    if missing := {"prompt", "answer"} - ranges.keys():
        raise BadInputError(f"--dataset {text!r}: {missing.pop()}=N is missing")
    longest = ranges["prompt"][1] + ranges["answer"][1]
    if max_tokens is not None and longest > max_tokens:
        raise BadInputError(f"--dataset {text!r}: up to {longest} tokens, but --max-tokens is {max_tokens}")
    return Synthetic(ranges["prompt"], ranges["answer"])


def _trace(path: Path, length_scale: float, max_tokens: int | None) -> Dataset:
    rows = _rows(path, length_scale, max_tokens)
    return rows if rows.arrivals_s else Lengths(rows.pool, rows.left_out)


def _rows(path: Path, length_scale: float, max_tokens: int | None) -> TimedRows:
    """Without arrivals_s where the file has none."""
    trace = read_trace(path)
    kept: list[tuple[TraceRow, Shape]] = []
    for row in trace.rows:
        shape = Shape(
            _scaled(row.prompt_tokens, length_scale),
            _scaled(row.output_tokens, length_scale),
            row.hash_ids,
            MOONCAKE_BLOCK * length_scale,
        )
        if max_tokens is None or shape.prompt_tokens + shape.output_tokens <= max_tokens:
            kept.append((row, shape))
    if not kept:
        raise BadInputError(f"{path}: all {len(trace.rows)} rows have more than --max-tokens {max_tokens}")
    arrivals = [row.arrival_s for row, _ in kept] if trace.timed else []
    return TimedRows([shape for _, shape in kept], arrivals, trace.coarse, len(trace.rows) - len(kept))


def _scaled(tokens: int, scale: float) -> int:
    return max(1, round(tokens * scale))


def _spread(rng: np.random.Generator, times: Times) -> Times:
    """Rows that share a time come, in their order, anywhere until the next time."""
    steps, first, counts = np.unique(times, return_index=True, return_counts=True)
    widths = np.diff(steps, append=steps[-1] + _usual_gap_s(steps))
    spread = times.copy()
    for start, count, width in zip(first, counts, widths, strict=True):
        spread[start : start + count] += np.sort(rng.random(count)) * width
    return spread


def _usual_gap_s(times: Times) -> float:
    """Between neighbours, on average; 0 if there are none."""
    return float(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
