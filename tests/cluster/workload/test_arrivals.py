"""When requests arrive."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.workload.arrivals import Arrivals, Process
from cluster.workload.errors import BadInputError

processes = st.sampled_from(["poisson", "gamma:0.5", "gamma:3", "constant"])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("text", ["poisson", "gamma:2.5", "constant", "trace"])
def test_they_are_read_as_they_are_written(text: str) -> None:
    assert str(Arrivals.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "uniform", "gamma", "gamma:", "gamma:0", "gamma:x", "gamma:nan", "poisson:2"]
)
def test_what_is_no_process_is_refused(text: str) -> None:
    with pytest.raises(BadInputError, match="--arrivals"):
        Arrivals.parse(text)


@given(processes, st.integers(0, 99), st.floats(0.1, 50), st.floats(0.5, 20))
def test_all_lie_in_the_time_and_in_order(text: str, seed: int, rate: float, duration_s: float) -> None:
    times = Arrivals.parse(text).during(rng(seed), rate, duration_s)
    assert (np.diff(times) >= 0).all()
    assert ((times >= 0) & (times < duration_s)).all()
    assert (times == Arrivals.parse(text).during(rng(seed), rate, duration_s)).all()


@given(processes, st.integers(0, 99), st.floats(0.1, 50), st.integers(1, 100))
def test_exactly_so_many(text: str, seed: int, rate: float, count: int) -> None:
    times = Arrivals.parse(text).exactly(rng(seed), rate, count)
    assert len(times) == count
    assert (np.diff(times) >= 0).all()
    assert ((times >= 0) & (times <= count / rate)).all()


@pytest.mark.parametrize(("text", "cv"), [("poisson", 1.0), ("gamma:0.5", 0.5), ("gamma:3", 3.0)])
def test_gaps_have_the_mean_and_the_variation(text: str, cv: float) -> None:
    times = Arrivals.parse(text).during(rng(), 10.0, 5000.0)
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.1, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_constant_ones_come_at_once_and_evenly() -> None:
    arrivals = Arrivals(Process.CONSTANT)
    assert arrivals.during(rng(), 2.0, 2.0) == pytest.approx([0.0, 0.5, 1.0, 1.5])
    assert arrivals.exactly(rng(), 2.0, 3) == pytest.approx([0.0, 0.5, 1.0])


def test_a_trace_has_its_own() -> None:
    with pytest.raises(ValueError, match="brings its own"):
        Arrivals(Process.TRACE).during(rng(), 1.0, 1.0)
