"""What tokens are held back: nothing while there is time to spare, and never much."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.piece_hold import MOST_S, PieceHold

SHARES = st.floats(0, 1)
SPANS = st.floats(0.001, 1.0)


class Loop:
    """A thread that is busy for given shares of given spans, seconds."""

    def __init__(self):
        self.now = self.cpu_s = 5.0
        self.hold = PieceHold(self.now, self.cpu_s)

    def run(self, span_s, share):
        self.now += span_s
        self.cpu_s += share * span_s
        self.hold.look(self.now, self.cpu_s)
        return self.hold.seconds


@given(st.lists(st.tuples(SPANS, SHARES), max_size=50))
def test_never_more_than_the_most_and_nothing_after_a_quiet_while(past):
    loop = Loop()
    for span_s, share in past:
        assert 0 <= loop.run(span_s, share) <= MOST_S
    assert loop.run(0.5, 0.2) == 0


@given(st.lists(st.tuples(SPANS, st.floats(0, 0.7)), max_size=50))
def test_a_loop_with_time_to_spare_holds_nothing(past):
    loop = Loop()
    assert all(loop.run(span_s, share) == 0 for span_s, share in past)


def test_it_grows_step_by_step_while_the_loop_is_busy_and_stays_where_that_is_enough():
    loop = Loop()
    grown = [loop.run(0.05, 1.0) for _ in range(100)]
    assert grown == sorted(grown)
    assert 0 < grown[0] < grown[5] < grown[-1] == MOST_S
    shrunk = loop.run(0.05, 0.1)
    assert shrunk < MOST_S
    assert loop.run(0.05, 0.78) == shrunk


def test_short_spans_are_not_judged():
    loop = Loop()
    assert [loop.run(0.001, 1.0) for _ in range(10)] == [0] * 10
