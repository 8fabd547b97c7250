"""How long a step will take: a model fitted to measurements, corrected by what is seen. No torch here.

The formulas are those of DistServe (Zhong et al. 2024, section 5) and of Sarathi-Serve's mixed steps, for a
step with prompt chunks of n_i new tokens after c_i cached ones, and B decoding sequences of K tokens of
context together:

    t = a0 + a1 * T + a2 * sum(n_i * (c_i + n_i / 2)) + a3 * sum(c_i + n_i) + b1 * B + b2 * K

T = B + sum(n_i) are the rows of the step's matrix products, whose cost per row falls as they fill the device
and depends on the kernel that is chosen by their number. So a1 * T is a sum of min(T, knot) and
max(0, T - knot) over powers of two: a line between each power of two and the next. No coefficient is
negative: more work never takes less time.

`LatencyModel` is the fit (latency_fit.py), a value. `OnlineLatency` corrects it while it is used, and makes
promises. A router asks either many times for each request, so an answer costs well under a microsecond: a
look at the line that T lies on, and a few products.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_VERSION = 1
_MAX_CORRECTION = 5.0
_MEMORY_S = 10.0
_LEAST_FORGETTING = 0.9
"""Of steps of a second and more: two parameters take some ten steps to tell from noise."""
_ROUNDING = 1e-6
_KNOTS = tuple(2**exponent for exponent in range(1, 13))


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

    @property
    def phase(self) -> str:
        """prefill, decode or mixed."""
        if not self.decode_batch:
            return "prefill"
        return "mixed" if self.prefill else "decode"


def features(shape: StepShape) -> dict[str, float]:
    """The terms of the formula by the names of their coefficients."""
    rows = shape.num_tokens
    return {
        "step": 1.0,
        "rows": rows,
        **{f"rows_to_{knot}": min(rows, knot) for knot in _KNOTS},
        **{f"rows_from_{knot}": max(0, rows - knot) for knot in _KNOTS},
        "prefill_attention": sum(new * (cached + new / 2) for new, cached in shape.prefill),
        "prefill_context": sum(new + cached for new, cached in shape.prefill),
        "prefill_chunks": len(shape.prefill),
        "decode_sequences": shape.decode_batch,
        "decode_context": shape.decode_context,
    }


_NAMES = frozenset(features(StepShape()))


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Seconds that a step takes; coefficients by the name of their feature, none negative.

    Without any (`unknown`) every step takes no time at all.
    """

    coefficients: Mapping[str, float]
    # By the number of bits of T: where its line begins, seconds there, seconds a row from there on.
    _lines: tuple[tuple[int, float, float], ...] = field(init=False, repr=False, compare=False)
    # Of sum(n * (c + n / 2)), sum(c + n), the number of chunks, B and K.
    _weights: tuple[float, float, float, float, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        get = self.coefficients.get
        object.__setattr__(self, "_lines", _lines(self.coefficients))
        weights = tuple(
            get(name, 0.0)
            for name in (
                "prefill_attention",
                "prefill_context",
                "prefill_chunks",
                "decode_sequences",
                "decode_context",
            )
        )
        object.__setattr__(self, "_weights", weights)

    @property
    def is_known(self) -> bool:
        """Whether it says anything."""
        return bool(self.coefficients)

    def step_s(self, shape: StepShape) -> float:
        """Any mixture; 0.0 for an empty step."""
        rows, attention, context = shape.decode_batch, 0.0, 0
        for new, cached in shape.prefill:
            rows += new
            attention += new * (cached + 0.5 * new)
            context += cached + new
        return self._seconds(
            rows, attention, context, len(shape.prefill), shape.decode_batch, shape.decode_context
        )

    def prefill_s(self, new: int, cached: int = 0) -> float:
        """One prompt chunk of `new` tokens after `cached` ones."""
        return self._seconds(new, new * (cached + 0.5 * new), cached + new, 1, 0, 0)

    def decode_s(self, batch: int, context: int) -> float:
        """One token for each of `batch` sequences that have `context` tokens together."""
        return self._seconds(batch, 0.0, 0, 0, batch, context)

    def decode_run_s(self, batch: int, context: int, count: int) -> list[float]:
        """So many steps one after the other: `decode_s`, each with a token more for each sequence."""
        without = self._seconds(batch, 0.0, 0, 0, batch, 0)
        each = self._weights[4]
        return [without + each * (context + number * batch) for number in range(count)]

    def mixed_s(self, batch: int, context: int, new: int, cached: int = 0) -> float:
        """A decode step that also computes one prompt chunk."""
        return self._seconds(batch + new, new * (cached + 0.5 * new), cached + new, 1, batch, context)

    def least_chunk(self, batch: int, context: int, cached: int, most: int) -> int:
        """The least prompt tokens beside a batch that are worth a chunk: of what one costs, no more than half
        is what it costs however small it is, such as reading the `cached` tokens again. At most `most`."""
        if most <= 1:
            return most
        one_s = self.mixed_s(batch, context, 1, cached)
        each_s = (self.mixed_s(batch, context, most, cached) - one_s) / (most - 1)
        fixed_s = one_s - each_s - self.decode_s(batch, context)
        if each_s <= 0 or fixed_s >= most * each_s:
            return most
        return max(1, math.ceil(fixed_s / each_s - _ROUNDING))

    def _seconds(
        self, rows: int, attention: float, chunk_context: int, num_chunks: int, batch: int, context: int
    ) -> float:
        if rows == 0:
            return 0.0
        lines = self._lines
        bits = rows.bit_length()
        first, seconds, a_row = lines[bits if bits < len(lines) else -1]
        a2, a3, a4, b1, b2 = self._weights
        return (
            seconds
            + a_row * (rows - first)
            + a2 * attention
            + a3 * chunk_context
            + a4 * num_chunks
            + b1 * batch
            + b2 * context
        )

    def times(self, factor: float) -> LatencyModel:
        """Of steps that all take so many times as long."""
        return LatencyModel({name: value * factor for name, value in self.coefficients.items()})

    def to_json(self) -> dict[str, Any]:
        return {"version": _VERSION, "coefficients": dict(self.coefficients)}

    @classmethod
    def unknown(cls) -> LatencyModel:
        """Of a worker that has not said how long its steps take."""
        return cls({})

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
        for name in coefficients:
            if name not in _NAMES:
                raise ProfileError(f"coefficient {name!r} is not one of this version: profile again")
        return cls.from_coefficients(coefficients)

    @classmethod
    def from_coefficients(cls, coefficients: Mapping[str, Any]) -> LatencyModel:
        """What a worker says of itself (WorkerInfo.latency); `unknown` if it says nothing.

        A name that is not one of this version is ignored: the worker may be of a later minor one. Raises
        ProfileError.
        """
        for name, value in coefficients.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ProfileError(f"coefficient {name} is {value!r}; it must be a number of at least 0")
        return cls({name: float(value) for name, value in coefficients.items() if name in _NAMES})


class OnlineLatency:
    """A model that follows what is observed.

    Expectations are offset + scale * model, by recursive least squares on relative errors with directional
    forgetting (Cao and Schwartz, 2000).
    Promises are expectations times exp(q), q the `quantile` of log(observed / expected) over `span` steps
    together, found by pinball updates: limits are kept on the average over the tokens of an answer, in which
    the scatter of single steps hardly shows.

    forgetting: weight of an observation against the next, and of long steps less, so that nothing counts for
    much longer than _MEMORY_S: a machine that becomes slower does so in seconds, not in steps. rate: how far
    `span` of them move q. Raises ValueError for what is no share of 1, or no number of steps.
    """

    __slots__ = (
        "_c00",
        "_c01",
        "_c11",
        "_expected_s",
        "_forgetting",
        "_margin",
        "_num_seen",
        "_offset_s",
        "_q",
        "_quantile",
        "_rate",
        "_scale",
        "_seen_s",
        "_span",
        "_unit_s",
        "model",
    )

    def __init__(
        self,
        model: LatencyModel,
        forgetting: float = 0.995,
        quantile: float = 0.9,
        rate: float = 0.02,
        span: int = 16,
    ) -> None:
        if not 0 < forgetting <= 1 or not 0 < quantile < 1 or not 0 < rate < 1:
            raise ValueError(
                f"forgetting {forgetting}, quantile {quantile}, rate {rate}: each is a share of 1"
            )
        if span < 1:
            raise ValueError(f"span {span}: promises are of one step at least")
        self.model = model
        self._forgetting = forgetting
        self._quantile = quantile
        self._rate = rate
        self._span = span
        self._q = 0.0
        self._margin = 1.0
        # Of the steps since q was last moved.
        self._num_seen = 0
        self._seen_s = self._expected_s = 0.0
        # The offset is counted in units of a typical step, so that both parameters are of order 1.
        self._unit_s = 0.0
        self._offset_s, self._scale = 0.0, 1.0
        # Of the covariance, which is symmetric.
        self._c00, self._c01, self._c11 = 0.1, 0.0, 0.1

    def corrected_s(self, model_s: float) -> float:
        """What is to be expected where the model alone says `model_s`: for who asks `model` directly."""
        if model_s == 0.0:
            return 0.0
        corrected = self._offset_s + self._scale * model_s
        # Corrections are learned where the load has been; far from there they must not turn absurd.
        if corrected < (least := model_s / _MAX_CORRECTION):
            return least
        return corrected if corrected < (most := model_s * _MAX_CORRECTION) else most

    @property
    def margin(self) -> float:
        """A promise is the expectation times this."""
        return self._margin

    def expect_s(self, shape: StepShape) -> float:
        """How long the step will take, half of the time."""
        return self.corrected_s(self.model.step_s(shape))

    def promise_s(self, shape: StepShape) -> float:
        """How long steps like it will take on average at most, in `quantile` of the cases."""
        return self.expect_s(shape) * self._margin

    def observe_run(self, batch: int, context: int, seconds: Iterable[float]) -> None:
        """Decode steps of the same sequences, one after the other, the first with so much context."""
        for number, one_s in enumerate(seconds):
            self.observe(StepShape((), batch, context + number * batch), one_s)

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Take a step into account; what is not a time is ignored."""
        predicted = self.model.step_s(shape)
        if not 0 < seconds < math.inf or predicted <= 0:
            return
        unit_s = self._unit_s = self._unit_s or predicted
        self._num_seen += 1
        self._seen_s += seconds
        self._expected_s += self.corrected_s(predicted)
        if self._num_seen >= self._span:
            self._move_margin()
        # Errors are relative to what is observed, so one time that is far too short would outweigh thousands.
        weight = 1.0 / max(seconds, predicted / _MAX_CORRECTION)
        x0, x1 = unit_s * weight, predicted * weight
        # Covariance times x, and the gain that follows from it.
        p0, p1 = self._c00 * x0 + self._c01 * x1, self._c01 * x0 + self._c11 * x1
        forgetting = max(_LEAST_FORGETTING, min(self._forgetting, math.exp(-predicted / _MEMORY_S)))
        known = x0 * p0 + x1 * p1
        if known <= 0.0:
            return
        error = 1.0 - (self._offset_s * weight + self._scale * x1)
        self._offset_s += p0 / (1.0 + known) * error * unit_s
        self._scale += p1 / (1.0 + known) * error
        # What the step tells is taken off the covariance, and what is forgotten is added in that direction
        # alone: steps that are all alike say nothing of the other one.
        change = ((1.0 / forgetting - 1.0) / known - 1.0) / (1.0 + known)
        c00 = max(0.0, self._c00 + p0 * p0 * change)
        c11 = max(0.0, self._c11 + p1 * p1 * change)
        c01 = self._c01 + p0 * p1 * change
        # Rounding must not make it the covariance of nothing that can be, nor absurd times one without end.
        most = math.sqrt(c00 * c11)
        shrink = 1.0 / max(1.0, c00 + c11)
        self._c00, self._c11 = c00 * shrink, c11 * shrink
        self._c01 = min(max(c01, -most), most) * shrink

    def _move_margin(self) -> None:
        is_above = self._seen_s > self._expected_s * self._margin
        self._q += self._rate * (self._quantile if is_above else self._quantile - 1)
        self._margin = math.exp(self._q)
        self._num_seen = 0
        self._seen_s = self._expected_s = 0.0


def _lines(coefficients: Mapping[str, float]) -> tuple[tuple[int, float, float], ...]:
    """What of the formula depends on T alone, and the step itself; see LatencyModel._lines."""

    def at(rows: int) -> float:
        terms = features(StepShape(decode_batch=rows))
        return math.fsum(
            coefficients.get(name, 0.0) * value
            for name, value in terms.items()
            if not name.startswith("decode")
        )

    lines = [(0, 0.0, 0.0)]
    for first in (1, *_KNOTS):
        slope = math.fsum(
            [
                coefficients.get("rows", 0.0),
                *(coefficients.get(f"rows_to_{knot}", 0.0) for knot in _KNOTS if knot > first),
                *(coefficients.get(f"rows_from_{knot}", 0.0) for knot in _KNOTS if knot <= first),
            ]
        )
        lines.append((first, at(first), slope))
    return tuple(lines)
