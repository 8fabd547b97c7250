"""The highest rate that attains the target."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.workload.crossing import Crossing, crossing, headline


def test_it_lies_on_the_line_between_two_rates() -> None:
    found = crossing({1.0: (100, 100), 2.0: (80, 100), 3.0: (10, 100)}, 0.9)
    assert found.rate == pytest.approx(1.5)
    assert found.bound == ""
    assert str(found) == "1.5"


def test_beyond_what_was_measured_it_is_a_bound() -> None:
    assert crossing({1.0: (9, 10), 2.0: (9, 10)}, 0.9) == Crossing(0.9, 2.0, ">=")
    assert crossing({1.0: (8, 10), 2.0: (1, 10)}, 0.9) == Crossing(0.9, 1.0, "<")
    with pytest.raises(ValueError, match="a rate at least"):
        crossing({}, 0.9)


def test_an_attainment_that_rises_with_the_rate_is_noise() -> None:
    # 88 % and 92 % are 90 % twice: the dip is not the end.
    noisy = {1.0: (100, 100), 2.0: (88, 100), 3.0: (92, 100), 4.0: (0, 100)}
    assert crossing(noisy, 0.9).rate == pytest.approx(3.0)
    assert crossing(noisy, 0.95).rate == pytest.approx(1.5)


counts = st.integers(1, 50).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))


@given(st.dictionaries(st.integers(1, 20).map(float), counts, min_size=1), st.floats(0.05, 1.0))
def test_as_the_definition_of_isotonic_regression_has_it(
    points: dict[float, tuple[int, int]], target: float
) -> None:
    """The min-max formula (Barlow et al. 1972) in place of pooling."""
    rates = sorted(points)

    def mean(start: int, end: int) -> float:
        chosen = [points[rate] for rate in rates[start : end + 1]]
        return sum(good for good, _ in chosen) / sum(total for _, total in chosen)

    falling = [
        min(max(mean(start, end) for end in range(at, len(rates))) for start in range(at + 1))
        for at in range(len(rates))
    ]
    found = crossing(points, target)
    if falling[0] < target:
        assert found == Crossing(target, rates[0], "<")
    elif falling[-1] >= target:
        assert found == Crossing(target, rates[-1], ">=")
    else:
        at = next(index for index, share in enumerate(falling) if share < target)
        part = (falling[at - 1] - target) / (falling[at - 1] - falling[at])
        assert found.rate == pytest.approx(rates[at - 1] + part * (rates[at] - rates[at - 1]))


def test_seeds_are_pooled_and_give_the_interval() -> None:
    found = headline([{1.0: (10, 10), 2.0: (8, 10)}, {1.0: (10, 10), 2.0: (10, 10)}], 0.9)
    assert (found.least.rate, found.pooled.rate, found.greatest.rate) == pytest.approx((1.5, 2.0, 2.0))
    assert (found.pooled.bound, found.greatest.bound) == (">=", ">=")
    assert found.to_json() == {"target": 0.9, "rate": 2.0, "bound": ">=", "least": 1.5, "greatest": 2.0}
