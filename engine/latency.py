"""How long a step will take: fitted to measured steps, corrected by what workers report. No torch here.

The formulas are those of DistServe (Zhong et al. 2024, section 5) and of Sarathi-Serve's mixed steps, for a
step with prompt chunks of n_i new tokens after c_i cached ones, and B decoding sequences of K tokens of
context together:

    t = a0 + a1 * T + a2 * sum(n_i * (c_i + n_i / 2)) + a3 * sum(c_i + n_i) + b1 * B + b2 * K

T = B + sum(n_i) are the rows of the step's matrix products, whose cost per row falls as they fill the device
and depends on the kernel that is chosen by their number. So a1 * T is a sum of min(T, knot) and
max(0, T - knot) over powers of two. No coefficient is negative: more work never takes less time.

`LatencyModel` is the fit, a value. `OnlineLatency` corrects it while it is used, and makes promises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_VERSION = 1
_MAX_CORRECTION = 5.0


class ProfileError(ValueError):
    """A profile or its samples cannot be used; the message says what is wrong with which value."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What of a step says how long it takes.

    prefill: (new tokens, cached tokens) of each prompt chunk. decode_batch: sequences that decode.
    decode_context: tokens of context of these together, the new ones included.
    """

    prefill: tuple[tuple[int, int], ...] = ()
    decode_batch: int = 0
    decode_context: int = 0

    @property
    def num_tokens(self) -> int:
        return self.decode_batch + sum(new for new, _ in self.prefill)


@dataclass(frozen=True, slots=True)
class Sample:
    """A measured step."""

    shape: StepShape
    seconds: float


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Seconds that a step takes; coefficients by the name of their feature, none negative."""

    coefficients: Mapping[str, float]

    def step_s(self, shape: StepShape) -> float:
        """Any mixture; 0.0 for an empty step."""
        if shape.num_tokens == 0:
            return 0.0
        return math.fsum(self.coefficients.get(name, 0.0) * value for name, value in _features(shape))

    def prefill_s(self, new: int, cached: int = 0) -> float:
        """One prompt chunk of `new` tokens after `cached` ones."""
        return self.step_s(StepShape(prefill=((new, cached),)))

    def decode_s(self, batch: int, context: int) -> float:
        """One token for each of `batch` sequences that have `context` tokens together."""
        return self.step_s(StepShape(decode_batch=batch, decode_context=context))

    def mixed_s(self, batch: int, context: int, new: int, cached: int = 0) -> float:
        """A decode step that also computes one prompt chunk."""
        return self.step_s(StepShape(((new, cached),), batch, context))

    def to_json(self) -> dict[str, Any]:
        return {"version": _VERSION, "coefficients": dict(self.coefficients)}

    @classmethod
    def from_json(cls, raw: object) -> LatencyModel:
        """What `to_json` gave. Raises ProfileError."""
        if not isinstance(raw, dict) or raw.get("version") != _VERSION:
            found = raw.get("version") if isinstance(raw, dict) else raw
            raise ProfileError(
                f"a latency model of version {_VERSION} is needed, not {found!r}: profile again"
            )
        coefficients = raw.get("coefficients")
        if not isinstance(coefficients, dict):
            raise ProfileError(f"coefficients is {coefficients!r}; it must be an object of numbers")
        known = set(_NAMES)
        for name, value in coefficients.items():
            if name not in known:
                raise ProfileError(f"coefficient {name!r} is not one of this version: profile again")
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ProfileError(f"coefficient {name} is {value!r}; it must be a number of at least 0")
        return cls({name: float(value) for name, value in coefficients.items()})


def fit(samples: Sequence[Sample]) -> LatencyModel:
    """The model whose relative errors over the samples have the least squares. Raises ProfileError."""
    if not samples:
        raise ProfileError("there are no samples to fit")
    for sample in samples:
        if not 0 < sample.seconds < math.inf or sample.shape.num_tokens < 1:
            raise ProfileError(f"a step of {sample.shape} that took {sample.seconds} s cannot be fitted")
    # Every row is divided by its time, so that residuals are relative; every column by its largest entry, so
    # that coefficients of seconds and of nanoseconds are found alike.
    rows = np.array([[value for _, value in _features(sample.shape)] for sample in samples])
    rows /= np.array([sample.seconds for sample in samples])[:, None]
    scales = rows.max(axis=0)
    used = scales > 0
    solution = np.zeros(len(scales))
    solution[used] = (
        _nonnegative_least_squares(rows[:, used] / scales[used], np.ones(len(rows))) / scales[used]
    )
    return LatencyModel(
        {name: float(value) for name, value in zip(_NAMES, solution, strict=True) if value > 0}
    )


def relative_errors(model: LatencyModel, samples: Sequence[Sample]) -> Array:
    """|predicted / measured - 1| of each sample."""
    return np.array([abs(model.step_s(sample.shape) / sample.seconds - 1) for sample in samples])


class OnlineLatency:
    """A model that follows what is observed.

    Expectations are offset + scale * model, by recursive least squares on relative errors with forgetting;
    promises are expectations times exp(q), q the `quantile` of log(observed / expected), found by pinball
    updates.

    forgetting: weight of an observation against the next. rate: how far one observation moves q.
    """

    def __init__(
        self, model: LatencyModel, forgetting: float = 0.995, quantile: float = 0.9, rate: float = 0.02
    ) -> None:
        if not 0 < forgetting <= 1 or not 0 < quantile < 1 or not 0 < rate < 1:
            raise ValueError(
                f"forgetting {forgetting}, quantile {quantile}, rate {rate}: each is a share of 1"
            )
        self._model = model
        self._forgetting = forgetting
        self._quantile = quantile
        self._rate = rate
        self._q = 0.0
        # offset (in units of a typical step, so that both parameters are of order 1) and scale.
        self._unit_s: float | None = None
        self._parameters: Array = np.array([0.0, 1.0])
        self._covariance: Array = np.eye(2) * 0.1

    def expect_s(self, shape: StepShape) -> float:
        """How long the step will take, half of the time."""
        predicted = self._model.step_s(shape)
        if self._unit_s is None or predicted == 0:
            return predicted
        offset, scale = self._parameters
        # Corrections are learned where the load has been; far from there they must not turn absurd.
        corrected = offset * self._unit_s + scale * predicted
        return float(np.clip(corrected, predicted / _MAX_CORRECTION, predicted * _MAX_CORRECTION))

    def promise_s(self, shape: StepShape) -> float:
        """How long the step will take at most, in `quantile` of the cases."""
        return self.expect_s(shape) * math.exp(self._q)

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Take a step into account; what is not a time is ignored."""
        predicted = self._model.step_s(shape)
        if not 0 < seconds < math.inf or predicted <= 0:
            return
        if self._unit_s is None:
            self._unit_s = predicted
        is_above = seconds > self.promise_s(shape)
        self._q += self._rate * (self._quantile if is_above else self._quantile - 1)
        # Errors are relative to what is observed, so one time that is far too short would outweigh thousands.
        row = np.array([self._unit_s, predicted]) / max(seconds, predicted / _MAX_CORRECTION)
        gain = self._covariance @ row / (self._forgetting + row @ self._covariance @ row)
        self._parameters = self._parameters + gain * (1 - row @ self._parameters)
        covariance = (self._covariance - np.outer(gain, row @ self._covariance)) / self._forgetting
        # Without news in one direction, forgetting alone would let the uncertainty there grow for ever.
        self._covariance = covariance * min(1.0, 1.0 / float(np.trace(covariance)))


_KNOTS = tuple(2**exponent for exponent in range(1, 13))


def _features(shape: StepShape) -> list[tuple[str, float]]:
    """Name and value of every term of the formula."""
    rows = shape.num_tokens
    return [
        ("step", 1.0),
        ("rows", rows),
        *((f"rows_to_{knot}", min(rows, knot)) for knot in _KNOTS),
        *((f"rows_from_{knot}", max(0, rows - knot)) for knot in _KNOTS),
        ("prefill_attention", sum(new * (cached + new / 2) for new, cached in shape.prefill)),
        ("prefill_context", sum(new + cached for new, cached in shape.prefill)),
        ("prefill_chunks", len(shape.prefill)),
        ("decode_sequences", shape.decode_batch),
        ("decode_context", shape.decode_context),
    ]


_NAMES = tuple(name for name, _ in _features(StepShape()))


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
