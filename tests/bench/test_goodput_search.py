"""Which rate comes next: on curves that are known, the two sides of each crossing are found, in few steps."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from bench.goodput.search import Grid, next_place

WIDE = 5
REQUESTS = 1000


def attained(place: int, knee: int, slope: float) -> float:
    """All is good up to the knee; from there on attainment falls by `slope` a place."""
    return max(0.0, 1.0 - max(0, place - knee) * slope)


def searched(
    knee: int, slope: float, start: int, least: int, targets: tuple[float, ...] = (0.9, 0.99)
) -> dict[int, tuple[int, int]]:
    """Everything that one round measures."""
    counts: dict[int, tuple[int, int]] = {}
    while (place := next_place(counts, counts, targets, start, least, WIDE)) is not None:
        assert place not in counts, "a place is measured once in a round"
        assert place >= least
        counts[place] = (round(REQUESTS * attained(place, knee, slope)), REQUESTS)
        assert len(counts) < 60
    return counts


@given(
    st.integers(-20, 20), st.floats(0.005, 0.5), st.integers(-20, 20), st.sampled_from([(0.9,), (0.9, 0.99)])
)
def test_both_sides_of_every_crossing_are_measured(
    knee: int, slope: float, start: int, targets: tuple[float, ...]
) -> None:
    counts = searched(knee, slope, start, -40, targets)
    for target in targets:
        enough = [place for place, (good, total) in counts.items() if good / total >= target]
        too_much = [place for place, (good, total) in counts.items() if good / total < target]
        assert max(enough) + 1 == min(too_much)


@given(st.integers(-20, 20), st.integers(-20, 20))
def test_it_takes_few_steps(knee: int, start: int) -> None:
    """One for each wide step, and as many as it takes to halve one."""
    counts = searched(knee, 0.2, start, -40)
    assert len(counts) <= abs(knee - start) / WIDE + 2 + math.ceil(math.log2(WIDE)) + 2


@given(st.integers(-20, 20), st.integers(-20, 20))
def test_what_nothing_can_serve_ends_at_the_lowest_place(start: int, least: int) -> None:
    counts = searched(-100, 1.0, start, least)
    assert min(counts) == least


@given(st.integers(-10, 10), st.floats(0.02, 0.5))
def test_a_later_round_measures_only_the_sides(knee: int, slope: float) -> None:
    before = searched(knee, slope, 0, -40)
    counts, own = dict(before), set[int]()
    while (place := next_place(counts, own, (0.9, 0.99), 0, -40, WIDE)) is not None:
        good, total = counts.get(place, (0, 0))
        counts[place] = (good + round(REQUESTS * attained(place, knee, slope)), total + REQUESTS)
        own.add(place)
    assert own <= set(before)
    assert len(own) <= 4
    for target in (0.9, 0.99):
        assert any(before[place][0] / REQUESTS >= target for place in own)
        assert any(before[place][0] / REQUESTS < target for place in own)


@given(st.lists(st.integers(0, 30), min_size=60, max_size=60), st.integers(-5, 5))
def test_noise_does_not_keep_it_going_for_ever(noise: list[int], start: int) -> None:
    """Whatever comes out, a round measures no place twice, and ends."""
    counts: dict[int, tuple[int, int]] = {}
    goods = iter(noise)
    while (place := next_place(counts, counts, (0.9, 0.99), start, -10, WIDE)) is not None:
        assert place not in counts
        counts[place] = (0 if place > 20 else next(goods), 30)


def test_the_grid_is_the_same_for_all() -> None:
    grid = Grid(1.15)
    for place in range(-20, 20):
        assert grid.place(grid.rate(place)) == place
        assert grid.place(grid.rate(place) * 1.1) == place
    assert grid.wide == 5
    assert Grid(2.0).wide == 1
