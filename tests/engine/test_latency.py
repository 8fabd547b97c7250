"""The latency model: what a fit recovers, what it promises, and what it refuses."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.latency import LatencyModel, OnlineLatency, ProfileError, StepShape, features
from engine.latency_fit import Sample, fit, relative_errors

SHAPES = st.builds(
    lambda prefill, batch, context: StepShape(tuple(prefill), batch, batch * context),
    st.lists(st.tuples(st.integers(1, 1024), st.integers(0, 2048)), max_size=3),
    st.integers(0, 64),
    st.integers(1, 2048),
)


def truth(shape: StepShape) -> float:
    """An engine whose products cost less a row from 32 rows on."""
    rows = shape.num_tokens
    attention = sum(new * (cached + new / 2) for new, cached in shape.prefill)
    return (
        0.008
        + 0.0008 * min(rows, 32)
        + 0.0005 * max(0, rows - 32)
        + 2e-8 * attention
        + 5e-7 * shape.decode_context
    )


def samples(count: int, seed: int, noise: float) -> list[Sample]:
    dice = random.Random(seed)

    def shape() -> StepShape:
        prefill = tuple(
            (dice.randint(1, 1024), dice.choice([0, 512])) for _ in range(dice.choice([0, 1, 1, 2]))
        )
        batch = dice.choice([0, dice.randint(1, 64)]) if prefill else dice.randint(1, 64)
        return StepShape(prefill, batch, batch * dice.randint(1, 1024))

    shapes = [shape() for _ in range(count)]
    return [Sample(s, truth(s) * math.exp(dice.gauss(0, noise))) for s in shapes]


def test_exact_samples_are_recovered() -> None:
    model = fit(samples(120, seed=1, noise=0))
    assert relative_errors(model, samples(200, seed=2, noise=0)).max() < 1e-6


def test_of_whole_prompts_nothing_is_learned_of_chunks() -> None:
    """Tokens that are read again cost what they cost a decode step, not a share of what they cost first."""
    row_s, context_s = 1e-4, 1e-6
    truth = LatencyModel(
        {"step": 0.02, "rows": row_s, "prefill_context": context_s, "decode_context": context_s}
    )
    shapes = [StepShape(((new, 0),)) for new in (16, 64, 256, 1024)]
    shapes += [StepShape((), batch, batch * context) for batch in (1, 8, 32) for context in (100, 1000)]
    found = fit([Sample(shape, truth.step_s(shape)) for shape in shapes])
    assert found.step_s(shapes[2]) == pytest.approx(truth.step_s(shapes[2]), rel=1e-6)
    for cached in (0, 1000):
        assert found.mixed_s(8, 800, 64, cached) == pytest.approx(truth.mixed_s(8, 800, 64, cached), rel=1e-3)


def test_noisy_samples_are_predicted_within_the_noise() -> None:
    model = fit(samples(120, seed=1, noise=0.03))
    assert np.median(relative_errors(model, samples(200, seed=2, noise=0))) < 0.02


@given(SHAPES, st.integers(1, 500), st.integers(0, 3))
def test_more_work_never_takes_less_time(shape: StepShape, more: int, what: int) -> None:
    model = fit(samples(60, seed=3, noise=0.1))
    prefill, batch, context = shape.prefill, shape.decode_batch, shape.decode_context
    larger = [
        StepShape((*prefill, (more, 0)), batch, context),
        StepShape(tuple((new, cached + more) for new, cached in prefill), batch, context),
        StepShape(prefill, batch + more, context + more),
        StepShape(prefill, batch, context + more) if batch else shape,
    ][what]
    assert model.step_s(larger) >= model.step_s(shape) >= 0
    assert all(value >= 0 for value in model.coefficients.values())


def test_an_empty_step_takes_no_time_and_a_mixed_one_less_than_its_parts() -> None:
    model = fit(samples(120, seed=1, noise=0.02))
    assert model.step_s(StepShape()) == 0
    parts = model.decode_s(16, 16 * 512), model.prefill_s(256, 128)
    assert max(parts) < model.mixed_s(16, 16 * 512, 256, 128) < sum(parts)


@given(
    st.floats(0, 0.1), st.floats(1e-5, 1e-3), st.floats(0, 1e-4), st.integers(0, 2000), st.integers(1, 512)
)
def test_of_a_chunk_that_is_worth_it_half_is_for_its_tokens(
    chunk_s: float, row_s: float, context_s: float, cached: int, most: int
) -> None:
    model = LatencyModel(
        {"step": 0.01, "rows": row_s, "prefill_chunks": chunk_s, "prefill_context": context_s}
    )
    least, fixed_s = model.least_chunk(4, 400, cached, most), chunk_s + context_s * cached
    assert 1 <= least <= most
    if least < most:
        assert fixed_s <= least * (row_s + context_s) * (1 + 1e-5)
    if least > 1:
        assert fixed_s > (least - 1) * (row_s + context_s) * (1 - 1e-5)


@given(SHAPES, st.dictionaries(st.sampled_from(sorted(features(StepShape()))), st.floats(0, 1e-3)))
def test_a_step_is_the_sum_of_its_features(shape: StepShape, coefficients: dict[str, float]) -> None:
    model = LatencyModel(coefficients)
    terms = (coefficients.get(name, 0.0) * value for name, value in features(shape).items())
    expected = math.fsum(terms) if shape.num_tokens else 0.0
    assert model.step_s(shape) == pytest.approx(expected, rel=1e-12, abs=0)
    (new, cached), *more = shape.prefill or ((0, 0),)
    if new and not more:
        batch, context = shape.decode_batch, shape.decode_context
        assert model.mixed_s(batch, context, new, cached) == pytest.approx(expected, rel=1e-12, abs=0)
        assert model.prefill_s(new, cached) == model.step_s(StepShape(((new, cached),)))
        assert model.decode_s(batch, context) == model.step_s(StepShape((), batch, context))


def test_an_unknown_model_expects_nothing_and_learns_nothing() -> None:
    model = LatencyModel.unknown()
    online = OnlineLatency(model)
    online.observe(StepShape(((8, 0),)), 3.0)
    assert not model.is_known
    assert online.expect_s(StepShape(((8, 0),))) == model.step_s(StepShape(((8, 0),))) == 0.0


def test_what_a_worker_says_of_itself_is_read_as_far_as_it_is_known() -> None:
    said = {"rows": 2.0, "step": 1, "phase_of_the_moon": 3.0}
    assert LatencyModel.from_coefficients(said) == LatencyModel({"rows": 2.0, "step": 1.0})
    assert LatencyModel.from_coefficients({}) == LatencyModel.unknown()
    with pytest.raises(ProfileError, match="phase_of_the_moon is nan"):
        LatencyModel.from_coefficients(said | {"phase_of_the_moon": math.nan})


def test_json_and_back() -> None:
    model = fit(samples(60, seed=1, noise=0.02))
    assert LatencyModel.from_json(json.loads(json.dumps(model.to_json()))) == model


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda raw: [], "of version 1 is needed"),
        (lambda raw: raw | {"version": 2}, "not 2"),
        (lambda raw: raw | {"coefficients": 5}, "must be an object"),
        (lambda raw: raw | {"coefficients": {"speed": 1.0}}, "'speed' is not one"),
        (lambda raw: raw | {"coefficients": {"rows": -1.0}}, "rows is -1.0"),
        (lambda raw: raw | {"coefficients": {"rows": math.nan}}, "rows is nan"),
        (lambda raw: raw | {"coefficients": {"rows": True}}, "rows is True"),
    ],
)
def test_what_is_no_latency_model_is_refused(change: Callable[[object], object], complaint: str) -> None:
    raw = fit(samples(60, seed=1, noise=0.02)).to_json()
    with pytest.raises(ProfileError, match=complaint):
        LatencyModel.from_json(change(raw))


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [Sample(StepShape(((4, 0),)), 0.0)],
        [Sample(StepShape(), 1.0)],
        [Sample(StepShape(((4, 0),)), math.nan)],
    ],
)
def test_samples_that_cannot_be_fitted_are_refused(bad: list[Sample]) -> None:
    with pytest.raises(ProfileError):
        fit(bad)


@pytest.mark.parametrize(("scale", "offset_s"), [(1.7, 0.0), (0.6, 0.0), (1.0, 0.02)])
def test_a_drift_is_followed_and_promises_of_many_steps_hold_nine_times_of_ten(
    scale: float, offset_s: float
) -> None:
    online = OnlineLatency(fit(samples(120, seed=1, noise=0)))
    dice = random.Random(4)

    def observed(shape: StepShape) -> float:
        return (truth(shape) * scale + offset_s) * math.exp(dice.gauss(0, 0.1))

    shapes = [sample.shape for sample in samples(400, seed=5, noise=0)]
    for shape in dice.choices(shapes, k=8000):
        online.observe(shape, observed(shape))
    errors = [online.expect_s(shape) / (truth(shape) * scale + offset_s) - 1 for shape in shapes]
    assert abs(np.median(errors)) < 0.06
    assert online.corrected_s(online.model.step_s(shapes[0])) == online.expect_s(shapes[0])
    assert online.expect_s(shapes[0]) * online.margin == online.promise_s(shapes[0])
    together = [dice.choices(shapes, k=16) for _ in range(1000)]
    kept = [sum(map(observed, some)) <= sum(map(online.promise_s, some)) for some in together]
    assert 0.8 < np.mean(kept) < 0.99


def test_a_promise_is_of_the_average_so_scatter_hardly_counts() -> None:
    model = fit(samples(120, seed=1, noise=0))
    dice = random.Random(4)
    shape = StepShape((), 4, 2000)
    single, together = OnlineLatency(model, span=1), OnlineLatency(model, span=16)
    for _ in range(8000):
        seconds = truth(shape) * math.exp(dice.gauss(0, 0.2))
        single.observe(shape, seconds)
        together.observe(shape, seconds)
    assert math.log(single.margin) == pytest.approx(1.28 * 0.2, abs=0.08)
    assert 0 < math.log(together.margin) < math.log(single.margin) / 2


def test_corrections_are_those_of_recursive_least_squares() -> None:
    """In matrices, as the textbooks have it."""
    model = fit(samples(120, seed=1, noise=0))
    online = OnlineLatency(model, forgetting=0.99)
    parameters, covariance = np.array([0.0, 1.0]), np.eye(2) * 0.1
    dice = random.Random(6)
    shapes = [sample.shape for sample in samples(200, seed=7, noise=0)]
    unit_s = model.step_s(shapes[0])
    for shape in shapes:
        seconds = 1.3 * model.step_s(shape) * math.exp(dice.gauss(0, 0.2)) + 0.01
        online.observe(shape, seconds)
        row = np.array([unit_s, model.step_s(shape)]) / seconds
        gain = covariance @ row / (1 + row @ covariance @ row)
        parameters = parameters + gain * (1 - row @ parameters)
        covariance = covariance - np.outer(gain, row @ covariance)
        # Forgetting, in the direction of the step alone.
        forgetting = max(0.9, min(0.99, math.exp(-model.step_s(shape) / 10)))
        along = covariance @ row
        covariance = covariance + (1 / forgetting - 1) * np.outer(along, along) / (row @ along)
        covariance *= min(1.0, 1.0 / np.trace(covariance))
        assert online.expect_s(shape) == pytest.approx(parameters @ [unit_s, model.step_s(shape)], rel=1e-9)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (LatencyModel({"step": 0.005, "rows": 0.0008}), StepShape(((512, 0),))),
        (LatencyModel({"step": 0.010, "decode_sequences": 0.001}), StepShape((), 5, 2500)),
    ],
)
def test_a_machine_that_becomes_slower_is_followed_in_seconds(model: LatencyModel, shape: StepShape) -> None:
    """Whether its steps are long or short, and although they have been alike for long."""
    online, step_s = OnlineLatency(model), model.step_s(shape)
    for _ in range(int(100 / step_s)):
        online.observe(shape, step_s)
    elapsed = 0.0
    while elapsed < 15.0:
        online.observe(shape, 1.5 * step_s)
        elapsed += 1.5 * step_s
    assert online.expect_s(shape) > 1.2 * step_s


@pytest.mark.parametrize("seconds", [1e-9, 5e-324, 1e9])
def test_a_single_absurd_time_is_soon_forgotten(seconds: float) -> None:
    model = fit(samples(120, seed=1, noise=0))
    online = OnlineLatency(model)
    shapes = [sample.shape for sample in samples(400, seed=5, noise=0)]
    for index, shape in enumerate(shapes):
        online.observe(shape, seconds if index == 50 else truth(shape))
    assert np.median([abs(online.expect_s(shape) / truth(shape) - 1) for shape in shapes]) < 0.04


@given(SHAPES, st.lists(st.sampled_from([0.0, -1.0, math.nan, math.inf, 1e-9, 1e9]), max_size=30))
def test_nonsense_does_not_break_expectations(shape: StepShape, times: list[float]) -> None:
    model = fit(samples(60, seed=3, noise=0.02))
    online = OnlineLatency(model)
    for seconds in times:
        online.observe(StepShape(((8, 0),)), seconds)
    expected = model.step_s(shape)
    assert expected / 5 <= online.expect_s(shape) <= expected * 5


@pytest.mark.parametrize("wrong", [{"forgetting": 0.0}, {"quantile": 1.0}, {"rate": 1.0}, {"span": 0}])
def test_an_online_model_takes_shares_and_at_least_one_step(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OnlineLatency(LatencyModel.unknown(), **wrong)
