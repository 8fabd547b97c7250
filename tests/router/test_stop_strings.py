"""Stop strings: whatever the pieces, the text is what stands before the first complete one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.stop_strings import StopStrings


def feed(stops, pieces, armed_from=0):
    """The text that comes out, and whether a stop string ended it."""
    matcher = StopStrings(stops)
    out = ""
    for index, piece in enumerate(pieces):
        text, stopped = matcher.push(piece, armed=index >= armed_from)
        out += text
        if stopped:
            return out, True
    return out + matcher.flush(), False


def slowly(stops, text, armed_from):
    """The same, by trying every end position in turn. armed_from: characters."""
    for end in range(armed_from + 1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        ([], ["a", "b"], ("ab", False)),
        (["END"], ["one E", "N", "D two"], ("one ", True)),
        (["END"], ["one E", "N", "d two"], ("one ENd two", False)),
        (["END"], ["one EN"], ("one EN", False)),
        (["abcd", "bc"], ["abcd"], ("a", True)),
        (["bc", "abc"], ["abc"], ("", True)),
        (["aab"], ["aaaab"], ("aa", True)),
    ],
)
def test_examples(stops, pieces, expected):
    assert feed(stops, pieces) == expected


def test_text_that_may_begin_a_stop_string_is_held_back_and_no_more():
    matcher = StopStrings(["\n\n"])
    assert matcher.push("line\n") == ("line", False)
    assert matcher.push("next") == ("\nnext", False)


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    armed_from=st.integers(0, 12),
)
def test_equals_the_slow_way_however_the_text_is_cut(stops, pieces, armed_from):
    boundary = sum(map(len, pieces[:armed_from]))
    assert feed(stops, pieces, armed_from) == slowly(stops, "".join(pieces), boundary)
