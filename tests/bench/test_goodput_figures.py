"""The headline: the crossing of all rounds together, and an interval over rounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.goodput.figures import figure_of

FALLING = {1.0: (100, 100), 2.0: (95, 100), 3.0: (85, 100)}


def test_the_crossing_is_on_the_line_between_the_rates_beside_it_and_per_device() -> None:
    figure = figure_of([FALLING], 0.9, 2)
    assert figure.value == pytest.approx(2.5 / 2)
    assert figure.bound == ""
    assert figure.interval is None, "of one round there is none"
    assert str(figure) == "1.25"


def test_rounds_are_pooled_by_requests() -> None:
    figure = figure_of([{2.0: (95, 100), 3.0: (0, 1)}, {3.0: (85, 99)}], 0.9, 1)
    assert figure.value == pytest.approx(2.5)


def test_equal_rounds_leave_no_doubt() -> None:
    figure = figure_of([FALLING, FALLING, FALLING], 0.9, 1)
    assert figure.interval == pytest.approx((2.5, 2.5))


def test_the_interval_spans_what_rounds_differ_by() -> None:
    better = {2.0: (100, 100), 3.0: (92, 100), 4.0: (80, 100)}
    figure = figure_of([FALLING, better], 0.9, 1)
    assert figure.interval is not None
    assert figure.interval[0] == pytest.approx(2.5)
    assert figure.interval[1] == pytest.approx(3 + 2 / 12)
    assert figure.interval[0] < figure.value < figure.interval[1]


def test_too_much_from_the_lowest_rate_on_is_no_goodput() -> None:
    figure = figure_of([{1.0: (50, 100), 2.0: (40, 100)}], 0.9, 2)
    assert (figure.value, figure.bound, str(figure)) == (0.0, "<", "none")


def test_never_enough_is_a_lower_bound() -> None:
    figure = figure_of([{1.0: (100, 100), 2.0: (99, 100)}], 0.9, 2)
    assert (figure.value, figure.bound) == (1.0, ">=")
    assert str(figure) == ">= 1"


def test_a_round_that_saw_only_too_much_does_not_pull_the_interval_to_nothing() -> None:
    figure = figure_of([FALLING, {2.0: (88, 100), 3.0: (80, 100)}], 0.9, 1)
    assert figure.interval is not None
    assert figure.interval[0] == pytest.approx(2.0 * 0.1 / 0.12)


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0]), st.integers(0, 50).map(lambda n: (n, 50)), min_size=1
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([0.9, 0.99]),
)  # fmt: skip
def test_the_value_lies_in_its_interval_and_among_the_rates(
    rounds: list[dict[float, tuple[int, int]]], target: float
) -> None:
    figure = figure_of(rounds, target, 1)
    rates = [rate for one in rounds for rate in one]
    assert figure.value == 0 or min(rates) <= figure.value <= max(rates)
    if figure.interval is not None:
        assert 0 <= figure.interval[0] <= figure.value <= figure.interval[1] <= max(rates)
    assert figure_of(rounds, target, 1) == figure, "the draws are the same every time"
