"""The limits that requests are judged by: seconds, or multiples of what the same request takes alone."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.workload.errors import BadInputError

DEFAULT = "ttft=3x,tpot=1.5x"
"""Splitwise (Patel et al. 2024) judges by multiples of the same request on an idle machine."""

_VALUE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ms|s|x|)")


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one request, seconds, both inclusive."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class IdlePoint:
    """What one request took while nothing else ran."""

    prompt_tokens: int
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class IdleTimes:
    """TTFT and TPOT of a request alone, by prompt length; between the points, and beyond the longest, on
    straight lines."""

    points: Sequence[IdlePoint]

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("idle times need a point at least")
        object.__setattr__(self, "points", tuple(sorted(self.points, key=lambda point: point.prompt_tokens)))

    def at(self, prompt_tokens: int) -> Limits:
        """Expected of a request of this length alone."""
        lengths = [point.prompt_tokens for point in self.points]
        if prompt_tokens <= lengths[0] or len(lengths) == 1:
            return Limits(self.points[0].ttft_s, self.points[0].tpot_s)
        right = min(bisect_left(lengths, prompt_tokens), len(lengths) - 1)
        low, high = self.points[right - 1], self.points[right]
        share = (prompt_tokens - low.prompt_tokens) / (high.prompt_tokens - low.prompt_tokens)

        def between(here: float, there: float) -> float:
            # A line that falls, from noise, must not go on to fall beyond the longest prompt.
            return here + (there - here) * (share if there > here else min(share, 1.0))

        return Limits(between(low.ttft_s, high.ttft_s), between(low.tpot_s, high.tpot_s))

    def to_json(self) -> list[dict[str, float]]:
        return [
            {"prompt_tokens": point.prompt_tokens, "ttft_s": point.ttft_s, "tpot_s": point.tpot_s}
            for point in self.points
        ]


@dataclass(frozen=True, slots=True)
class Limit:
    """Seconds, or a multiple of the time alone."""

    value: float
    relative: bool = False

    def seconds(self, alone_s: float) -> float:
        return self.value * alone_s if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.value:g}x" if self.relative else f"{self.value:g} s"


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits on TTFT and TPOT. idle: what relative limits are multiples of; needed for these alone."""

    ttft: Limit
    tpot: Limit
    idle: IdleTimes | None = None

    @classmethod
    def fixed(cls, ttft_s: float, tpot_s: float) -> Slo:
        """The same seconds for every request."""
        return cls(Limit(ttft_s), Limit(tpot_s))

    @classmethod
    def parse(cls, text: str) -> Slo:
        """`ttft=2,tpot=60ms` (seconds, or ms), `ttft=3x,tpot=1.5x` (multiples), or one of each.

        Raises BadInputError.
        """
        found: dict[str, Limit] = {}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            match = _VALUE.fullmatch(value)
            if name not in ("ttft", "tpot") or name in found or match is None:
                raise BadInputError(
                    f"--slo {text!r}: {part!r} is not understood; write it as ttft=2,tpot=60ms or "
                    f"ttft=3x,tpot=1.5x"
                )
            number, unit = float(match[1]), match[2]
            if number == 0 or not math.isfinite(number):
                raise BadInputError(f"--slo {text!r}: {name} must be greater than 0")
            if unit == "x" and number < 1:
                raise BadInputError(
                    f"--slo {text!r}: {name} is {number:g} times what a request takes alone, which none can "
                    f"meet; give at least 1x"
                )
            found[name] = Limit(number / 1000 if unit == "ms" else number, unit == "x")
        if missing := {"ttft", "tpot"} - found.keys():
            raise BadInputError(f"--slo {text!r}: {missing.pop()} is missing; both limits are needed")
        return cls(found["ttft"], found["tpot"])

    @property
    def is_relative(self) -> bool:
        return self.ttft.relative or self.tpot.relative

    def with_idle(self, idle: IdleTimes) -> Slo:
        """The same limits, once it is known what requests take alone."""
        return replace(self, idle=idle)

    def limits(self, prompt_tokens: int) -> Limits:
        """Of a request with a prompt of this length."""
        if self.idle is None:
            if self.is_relative:
                raise ValueError("multiples of idle times need idle times: Slo.with_idle")
            return Limits(self.ttft.value, self.tpot.value)
        alone = self.idle.at(prompt_tokens)
        return Limits(self.ttft.seconds(alone.ttft_s), self.tpot.seconds(alone.tpot_s))

    def to_json(self) -> dict[str, Any]:
        """ttft_s, tpot_s: None where the limit depends on the request."""
        return {
            "ttft": str(self.ttft),
            "tpot": str(self.tpot),
            "ttft_s": None if self.ttft.relative else self.ttft.value,
            "tpot_s": None if self.tpot.relative else self.tpot.value,
            "idle": None if self.idle is None else self.idle.to_json(),
        }
