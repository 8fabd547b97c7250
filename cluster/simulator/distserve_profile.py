"""The profiles of DistServe's simulator: step times in milliseconds, and how many tokens of KV fit.

Zhong et al., OSDI 2024. Two files: `NAME.json`, coefficients by model and tensor parallelism, and beside it a
CSV `max_num_tokens*.csv` with KV capacities by tensor and pipeline parallelism.

    prefill   (a + b * sum(len) + c * sum(len^2)) / PP + 1 ms * PP
    decode    (a + b * sum(context + 1) + c * batch) / PP, of two sets by the size of the batch
    both      2 ms + 1e-4 ms a token more, on the first of the PP stages
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from cluster.simulator.errors import ProfileMissError, SimulationError

Line: TypeAlias = tuple[float, float, float]

PIPELINE_MS = 1.0
"""Of a prefill step on each stage, for each stage that there is."""

FIRST_STAGE_MS = 2.0
FIRST_STAGE_TOKEN_MS = 1e-4


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Of a model split into tp x pp: of one stage, seconds. capacity: tokens of KV that fit; the most prompt
    tokens of one batch."""

    prefill: Line
    decode_small: Line
    decode_large: Line
    large_from: int
    pp: int
    capacity: int

    def prefill_s(self, lengths: Sequence[int], *, is_first: bool) -> float:
        """lengths: of the prompts of a batch."""
        a, b, c = self.prefill
        tokens, squares = sum(lengths), sum(length * length for length in lengths)
        ms = (a + b * tokens + c * squares) / self.pp + PIPELINE_MS * self.pp
        return (ms + self._first_ms(tokens) if is_first else ms) / 1000

    def decode_s(self, batch: int, context: int, *, is_first: bool) -> float:
        """context: tokens of the sequences of the batch together, before this step."""
        a, b, c = self.decode_small if batch < self.large_from else self.decode_large
        ms = (a + b * (context + batch) + c * batch) / self.pp
        return (ms + self._first_ms(context) if is_first else ms) / 1000

    @staticmethod
    def _first_ms(tokens: int) -> float:
        return FIRST_STAGE_MS + FIRST_STAGE_TOKEN_MS * tokens


@dataclass(frozen=True, slots=True)
class DistServeProfile:
    """lines: by model and tensor parallelism, as in the file. capacities: by model, tp and pp."""

    path: Path
    lines: Mapping[str, Mapping[int, Mapping[str, Any]]]
    capacities: Mapping[tuple[str, int, int], int]

    @classmethod
    def read(cls, path: Path) -> DistServeProfile:
        """Raises SimulationError."""
        raw = _json(path)
        lines: dict[str, dict[int, Mapping[str, Any]]] = {}
        for model, by_tp in raw.items():
            if not isinstance(by_tp, dict) or not all(str(tp).isdigit() for tp in by_tp):
                raise SimulationError(
                    f"{path}: under {model!r} there must be coefficients by tensor parallelism, as in "
                    '{"1": {"prefill": [a, b, c], ...}}'
                )
            lines[model] = {int(tp): _checked(path, model, tp, part) for tp, part in by_tp.items()}
        if not lines:
            raise SimulationError(f"{path}: there is no model in it")
        return cls(path, lines, _capacities(path.parent))

    @property
    def models(self) -> list[str]:
        return sorted(self.lines)

    def named(self, name: str) -> str:
        """The model's full name, of which `name` may be the last part. Raises ProfileMissError."""
        found = [model for model in self.lines if name in (model, model.rpartition("/")[2])]
        if len(found) != 1:
            raise ProfileMissError(
                f"--model {name}: {self.path} is a profile of {', '.join(self.models)}; give one of these, "
                "or another --profile"
            )
        return found[0]

    def splits(self, model: str) -> list[tuple[int, int]]:
        """(tp, pp) whose step times and capacities are known."""
        return sorted(
            (tp, pp) for name, tp, pp in self.capacities if name == model and tp in self.lines[model]
        )

    def step_times(self, model: str, tp: int, pp: int) -> StepTimes:
        """Raises ProfileMissError."""
        capacity = self.capacities.get((model, tp, pp))
        part = self.lines[model].get(tp)
        if part is None or capacity is None:
            known = ", ".join(f"tp={tp},pp={pp}" for tp, pp in self.splits(model)) or "none"
            raise ProfileMissError(
                f"{self.path}: nothing is known of {model} with tp={tp},pp={pp}; what is known: {known}"
            )
        return StepTimes(
            _line(part["prefill"]),
            _line(part["decoding_smallbs"]),
            _line(part["decoding_largebs"]),
            part["decoding_large_small_bs_threshold"],
            pp,
            capacity,
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SimulationError(f"--profile {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise SimulationError(f"--profile {path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise SimulationError(f"--profile {path}: a profile of DistServe's is an object of models")
    return raw


def _checked(path: Path, model: str, tp: object, part: object) -> Mapping[str, Any]:
    names = ("prefill", "decoding_smallbs", "decoding_largebs")
    if not isinstance(part, dict) or not isinstance(part.get("decoding_large_small_bs_threshold"), int):
        part = {}
    if part and all(_is_line(part.get(name)) for name in names):
        return part
    raise SimulationError(
        f"{path}: {model}, tp={tp}: there must be {', '.join(names)} with three numbers each, and "
        "decoding_large_small_bs_threshold with a whole number"
    )


def _is_line(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(one, int | float) and math.isfinite(one) for one in value)
    )


def _line(values: list[float]) -> Line:
    a, b, c = values
    return float(a), float(b), float(c)


def _capacities(folder: Path) -> dict[tuple[str, int, int], int]:
    """Of all models that some CSV in the folder has. Raises SimulationError."""
    found: dict[tuple[str, int, int], int] = {}
    paths = sorted(folder.glob("max_num_tokens*.csv"))
    if not paths:
        raise SimulationError(
            f"{folder}: beside a profile there must be a max_num_tokens*.csv with the columns "
            "model, tp, pp, max_num_tokens"
        )
    for path in paths:
        rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
        for row in rows:
            try:
                key = (row["model"], int(row["tp"]), int(row["pp"]))
                found[key] = int(row["max_num_tokens"])
            except (KeyError, TypeError, ValueError) as error:
                raise SimulationError(
                    f"{path}, line {rows.line_num}: {row}; expected model, tp, pp, max_num_tokens"
                ) from error
    return found
