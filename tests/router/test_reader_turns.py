"""Whose turn it is to read: in order, a few in a turn of the event loop, tokens meanwhile merged."""

from __future__ import annotations

import asyncio

from router.answer_stream import AnswerStream
from router.reader_turns import READERS_A_TURN, ReaderTurns
from router.requests import Delta


async def test_a_few_are_woken_in_each_turn_in_order():
    turns, woken = ReaderTurns(), []
    for number in range(2 * READERS_A_TURN + 1):
        turns.wait(lambda number=number: woken.append(number))
    assert woken == []
    for turn in range(1, 4):
        await asyncio.sleep(0)
        assert woken == list(range(min(turn * READERS_A_TURN, 2 * READERS_A_TURN + 1)))
    turns.wait(lambda: woken.append("later"))
    await asyncio.sleep(0)
    assert woken[-1] == "later"


async def test_what_comes_before_its_turn_is_in_the_readers_piece():
    waiting = []
    stream = AnswerStream(lambda: None, lambda: None, waiting.append)
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    for token in range(5):
        stream.put(Delta((token,), "x", None))
        await asyncio.sleep(0)
    assert not reading.done()
    assert len(waiting) == 1
    waiting.pop()()
    assert (await reading).token_ids == (0, 1, 2, 3, 4)
    # What comes while the piece is on its way waits for a turn of its own.
    stream.put(Delta((5,), "x", None))
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    assert not reading.done()
    waiting.pop()()
    assert (await reading).token_ids == (5,)


async def test_a_turn_that_comes_after_the_reader_has_left_is_harmless():
    waiting = []
    stream = AnswerStream(lambda: None, lambda: None, waiting.append)
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    stream.put(Delta((1,), "x", None))
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    waiting.pop()()
