"""The short way to an event that is nothing but text gives the bytes of the long one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.openai_responses import Part, Reply, event


@pytest.mark.parametrize("chat", [False, True])
@given(text=st.text(min_size=1), model=st.text(), index=st.integers(0, 63))
def test_both_ways_give_the_same(chat, text, model, index):
    reply = Reply("cmpl-1", model, 7, chat)
    long_way = event(reply.part_chunk(index, Part(text, None, None, None), False))
    assert reply.text_event(index, text) == long_way
    assert reply.text_event(index, text) == long_way  # the second one finds what the first one kept
