"""Fits the latency model to measured steps. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.latency import LatencyModel, ProfileError, StepShape, features

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sample:
    """A measured step."""

    shape: StepShape
    seconds: float


def fit(samples: Sequence[Sample]) -> LatencyModel:
    """The model whose relative errors over the samples have the least squares.

    Where no prompt was measured in chunks, nothing says what reading the cached tokens again costs these: as
    much as it costs a decode step, then, if one was measured. Left free, that would take a part of what each
    token costs once.
    Raises ProfileError.
    """
    if not samples:
        raise ProfileError("there are no samples to fit")
    for sample in samples:
        if not 0 < sample.seconds < math.inf or sample.shape.num_tokens < 1:
            raise ProfileError(f"a step of {sample.shape} that took {sample.seconds} s cannot be fitted")
    # Every row is divided by its time, so that residuals are relative; every column by its largest entry, so
    # that coefficients of seconds and of nanoseconds are found alike.
    rows = np.array([list(features(sample.shape).values()) for sample in samples])
    rows /= np.array([sample.seconds for sample in samples])[:, None]
    names = list(features(StepShape()))
    again, context = names.index("prefill_context"), names.index("decode_context")
    are_whole = not any(cached for sample in samples for _, cached in sample.shape.prefill)
    if are_whole:
        if rows[:, context].any():
            rows[:, context] += rows[:, again]
        rows[:, again] = 0.0
    scales = rows.max(axis=0)
    used = scales > 0
    solution = np.zeros(len(scales))
    solution[used] = (
        _nonnegative_least_squares(rows[:, used] / scales[used], np.ones(len(rows))) / scales[used]
    )
    if are_whole:
        solution[again] = solution[context]
    return LatencyModel(
        {name: float(value) for name, value in zip(names, solution, strict=True) if value > 0}
    )


def relative_errors(model: LatencyModel, samples: Sequence[Sample]) -> Array:
    """|predicted / measured - 1| of each sample."""
    return np.array([abs(model.step_s(sample.shape) / sample.seconds - 1) for sample in samples])


def _nonnegative_least_squares(matrix: Array, target: Array) -> Array:
    """argmin |matrix @ x - target| over x >= 0: the active-set method of Lawson and Hanson (1974)."""
    num_columns = matrix.shape[1]
    solution = np.zeros(num_columns)
    passive = np.zeros(num_columns, dtype=bool)
    # A column joins while the residual still falls along it; the bound ends what rounding would keep going.
    for _ in range(3 * num_columns):
        gradient = matrix.T @ (target - matrix @ solution)
        gradient[passive] = -np.inf
        if gradient.max() <= 1e-9 * len(target):
            break
        passive[gradient.argmax()] = True
        while True:
            trial = np.zeros(num_columns)
            trial[passive] = np.linalg.lstsq(matrix[:, passive], target, rcond=None)[0]
            wrong = passive & (trial <= 0)
            if not wrong.any():
                break
            # As far towards the trial as no coefficient turns negative; those that reach 0 leave.
            steps = solution[wrong] / (solution[wrong] - trial[wrong])
            solution += steps.min() * (trial - solution)
            passive &= solution > 1e-12
            solution[~passive] = 0
        solution = trial
    return solution
