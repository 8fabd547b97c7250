"""What the router remembers of its workload, and when it says that it has changed."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.workload_profile import WINDOW_S, Trait, WorkloadProfile


class Traffic:
    """Poisson arrivals, each answered at once."""

    def __init__(self, seed: int = 0) -> None:
        self.profile = WorkloadProfile(0.0)
        self.now = 0.0
        self._dice = random.Random(seed)

    def windows(
        self, count: int, rate: float, *, prompt: int = 500, answer: int = 100, hits: float = 0.0
    ) -> None:
        end = self.now + count * WINDOW_S
        while (gap := self._dice.expovariate(rate)) + self.now < end:
            self.now += gap
            tokens = max(1, round(prompt * self._dice.uniform(0.5, 1.5)))
            answered = max(1, round(answer * self._dice.uniform(0.5, 1.5)))
            self.profile.arrived(self.now)
            self.profile.ended(self.now, tokens, answered, round(hits * tokens))
        self.now = end

    def drifts(self) -> set[Trait]:
        return {one.trait for one in self.profile.drifts(self.now)}


@pytest.mark.parametrize("seed", range(20))
def test_chance_alone_is_no_drift(seed: int) -> None:
    traffic = Traffic(seed)
    for _ in range(30):
        traffic.windows(1, 0.5)
        assert not traffic.drifts()


@pytest.mark.parametrize(
    ("change", "trait"),
    [
        ({"rate": 2.0}, Trait.RATE),
        ({"rate": 0.4}, Trait.RATE),
        ({"rate": 1.0, "prompt": 900}, Trait.PROMPT),
        ({"rate": 1.0, "answer": 40}, Trait.ANSWER),
        ({"rate": 1.0, "hits": 0.5}, Trait.HITS),
    ],
)
def test_each_trait_that_changes_is_named_with_what_it_was(change: dict[str, float], trait: Trait) -> None:
    traffic = Traffic()
    traffic.windows(12, 1.0)
    assert not traffic.drifts()
    traffic.windows(5, **change)  # type: ignore[arg-type]
    assert traffic.drifts() == {trait}
    (drift,) = traffic.profile.drifts(traffic.now)
    before = {Trait.RATE: 1.0, Trait.PROMPT: 500, Trait.ANSWER: 100, Trait.HITS: 0.0}[trait]
    now = {"rate": drift.now, "prompt": 900, "answer": 40, "hits": 0.5}
    assert drift.before == pytest.approx(before, rel=0.1, abs=1e-9)
    assert drift.now == pytest.approx(change["rate"] if trait is Trait.RATE else now[trait.value], rel=0.15)


def test_an_hour_later_the_change_is_what_is_usual() -> None:
    traffic = Traffic()
    traffic.windows(12, 1.0)
    traffic.windows(5, 3.0)
    assert traffic.drifts() == {Trait.RATE}
    traffic.windows(61, 3.0)
    assert not traffic.drifts()


def test_when_nothing_comes_any_more_that_is_a_drift() -> None:
    traffic = Traffic()
    traffic.windows(12, 1.0)
    assert {one.trait for one in traffic.profile.drifts(traffic.now + 5 * WINDOW_S)} == {Trait.RATE}


def test_what_a_plan_needs_is_of_the_last_minutes() -> None:
    traffic = Traffic()
    traffic.windows(10, 0.2, prompt=100)
    traffic.windows(6, 2.0, prompt=800, hits=0.25)
    seen = traffic.profile.seen(traffic.now)
    assert seen.rate == pytest.approx(2.0, rel=0.15)
    assert seen.hit_share == pytest.approx(0.25, abs=0.01)
    assert sum(prompt for prompt, _ in seen.shapes[-300:]) / 300 == pytest.approx(800, rel=0.1)


def test_the_latest_is_of_the_last_window_and_the_one_under_way() -> None:
    traffic = Traffic()
    traffic.windows(6, 8.0, prompt=100)
    traffic.windows(1, 2.0, prompt=800)
    seen = traffic.profile.seen(traffic.now)  # a window has just begun
    assert seen.latest_rate == pytest.approx(2.0, rel=0.3)
    assert seen.rate > 2 * seen.latest_rate
    assert seen.num_latest == pytest.approx(120, rel=0.3)
    assert min(prompt for prompt, _ in seen.shapes[-seen.num_latest :]) > 400
    later = traffic.profile.seen(traffic.now + 10 * WINDOW_S)
    assert (later.latest_rate, later.num_latest) == (0.0, 0)


def test_refused_requests_are_load_too() -> None:
    profile = WorkloadProfile(0.0)
    for second in range(60):
        profile.arrived(float(second))
    profile.ended(59.0, 100, 5, 0)
    profile.ended(59.0, 100, 5, 50)
    seen = profile.seen(60.0)
    assert seen.rate == pytest.approx(1.0)
    assert seen.hit_share == 0.25
    assert seen.shapes == ((100, 5), (100, 5))


@given(st.lists(st.floats(0, 4000), max_size=60))
def test_it_never_fails_whatever_the_gaps(gaps: list[float]) -> None:
    profile, now = WorkloadProfile(0.0), 0.0
    for gap in gaps:
        now += gap
        profile.arrived(now)
        profile.ended(now, 1 + int(gap), 1, 0)
        assert profile.seen(now).rate >= 0
        assert all(math.isfinite(drift.now) for drift in profile.drifts(now))
    assert len(profile.seen(now).shapes) == len(gaps)


def test_only_so_many_answers_are_kept() -> None:
    profile = WorkloadProfile(0.0)
    for number in range(3000):
        profile.ended(float(number), number, 1, 0)
    seen = profile.seen(3000.0)
    shapes = seen.shapes
    assert seen.num_latest <= len(shapes)
    assert [prompt for prompt, _ in shapes] == list(range(2000, 3000))
