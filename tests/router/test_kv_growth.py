"""The peak of what answers hold, beside one that takes token by token."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.kv_growth import peak_growth

ANSWERS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 60)), max_size=12)


def token_by_token(answers: list[tuple[int, int]]) -> int:
    """Each step everybody who still writes takes a token; whoever has written the last gives all back."""
    first = peak = sum(held for _, held in answers)
    alive = [[to_come, held] for to_come, held in answers]
    while alive:
        for one in alive:
            one[0] -= 1
            one[1] += 1
        peak = max(peak, sum(held for _, held in alive))
        alive = [one for one in alive if one[0] > 0]
    return peak - first


def test_one_answer_grows_by_what_is_to_come() -> None:
    assert peak_growth([(7, 100)]) == 7


def test_what_the_first_gives_back_the_others_take() -> None:
    # Both grow by 2, then 12 are given back, and the other takes 8 more.
    assert peak_growth([(2, 10), (10, 10)]) == 4
    # With 3 to give back, 5, the peak is at the end.
    assert peak_growth([(2, 3), (10, 10)]) == 2 * 2 - (3 + 2) + 8


def test_where_nobody_is_nothing_grows() -> None:
    assert peak_growth([]) == 0


@given(ANSWERS)
def test_as_token_by_token(answers: list[tuple[int, int]]) -> None:
    assert peak_growth(answers) == token_by_token(answers)


@given(ANSWERS)
def test_order_does_not_matter_and_more_to_come_is_never_less(
    answers: list[tuple[int, int]],
) -> None:
    assert peak_growth(answers[::-1]) == peak_growth(answers)
    longest = max((to_come for to_come, _ in answers), default=0)
    assert peak_growth([*answers, (longest, 10**6)]) >= peak_growth(answers)
