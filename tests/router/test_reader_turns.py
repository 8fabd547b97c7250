"""Whose turn it is to read: in order, a few in a turn of the event loop, tokens meanwhile merged."""

from __future__ import annotations

import asyncio
import time

import uvloop

from router.answer_stream import AnswerStream
from router.piece_hold import MOST_S
from router.reader_turns import LEAST_A_TURN, MOST_A_TURN, MOST_WRITING, ReaderTurns
from router.requests import Delta, Finish, FinishReason


class ByHand:
    """Turns that come when the test says so."""

    def __init__(self):
        self.waiting = []
        self.writing = 0

    def wait(self, wake, *, at_once):
        self.waiting.append(wake)

    def wake(self):
        self.writing += 1
        self.waiting.pop()()

    def done(self):
        self.writing -= 1


def stream_with(turns):
    return AnswerStream(lambda: None, lambda: None, turns)


async def test_a_few_are_woken_in_each_turn_in_order():
    turns, woken = ReaderTurns(), []

    def wake(number):
        woken.append(number)
        turns.done()

    for number in range(2 * MOST_A_TURN + 1):
        turns.wait(lambda number=number: wake(number))
    assert woken == []
    for turn in range(1, 4):
        await asyncio.sleep(0)
        assert woken == list(range(min(turn * MOST_A_TURN, 2 * MOST_A_TURN + 1)))
    turns.wait(lambda: wake("later"))
    await asyncio.sleep(0)
    assert woken[-1] == "later"


async def test_fewer_are_woken_while_many_write_but_never_none():
    turns, woken = ReaderTurns(), []
    for number in range(MOST_WRITING + 10 * LEAST_A_TURN):
        turns.wait(lambda number=number: woken.append(number))
    for _ in range(-(-MOST_WRITING // MOST_A_TURN)):
        await asyncio.sleep(0)
    assert len(woken) >= MOST_WRITING
    before = len(woken)
    await asyncio.sleep(0)
    assert len(woken) == before + LEAST_A_TURN
    for _ in range(MOST_A_TURN + LEAST_A_TURN):
        turns.done()
    await asyncio.sleep(0)
    assert len(woken) == before + LEAST_A_TURN + MOST_A_TURN


class BusyClock:
    """Of a loop whose thread seems to be at work all the time; stands still unless told."""

    now = 100.0

    def __call__(self):
        return self.now


async def busy_turns(clock):
    """Turns that hold back for as long as they may."""
    turns = ReaderTurns(clock, cpu_s=clock)
    for _ in range(30):
        clock.now += 0.1
        turns.wait(turns.done, at_once=True)
        await asyncio.sleep(0)
    return turns


async def test_a_busy_loop_holds_readers_back_but_not_who_waits_for_a_first_token_or_an_end():
    clock = BusyClock()
    turns, woken = await busy_turns(clock), []
    held = asyncio.Event()

    def wake(name):
        woken.append(name)
        turns.done()
        held.set()

    turns.wait(lambda: wake("held"))
    turns.wait(lambda: wake("at once"), at_once=True)
    await asyncio.sleep(0)
    assert woken == ["at once"]
    held.clear()
    clock.now += MOST_S
    await held.wait()
    assert woken == ["at once", "held"]


async def test_held_back_tokens_come_as_one_piece_at_the_latest_with_the_end():
    stream = stream_with(await busy_turns(BusyClock()))
    pieces = []

    async def read():
        async for delta in stream:
            pieces.append(delta.token_ids)

    reading = asyncio.create_task(read())
    for token in range(6):
        stream.put(Delta((token,), "x", Finish(FinishReason.LENGTH, 1, 6, None) if token == 5 else None))
        for _ in range(3):
            await asyncio.sleep(0)
    assert pieces == [(0,), (1, 2, 3, 4, 5)]  # and no time has passed
    await reading


def test_who_is_held_back_is_not_looked_for_all_the_time():
    """uvloop rounds times to milliseconds: a timer that is due within less fires again and again."""
    releases = []

    class Counting(ReaderTurns):
        def _release(self):
            releases.append(None)
            super()._release()

    async def hold_one_after_the_other():
        turns = Counting(cpu_s=time.monotonic)
        for _ in range(200):
            turns.wait(turns.done)
            await asyncio.sleep(0.001)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(hold_one_after_the_other())
    assert 0 < len(releases) <= 200


async def test_what_comes_before_its_turn_is_in_the_readers_piece():
    turns = ByHand()
    stream = stream_with(turns)
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    for token in range(5):
        stream.put(Delta((token,), "x", None))
        await asyncio.sleep(0)
    assert not reading.done()
    assert len(turns.waiting) == 1
    turns.wake()
    assert (await reading).token_ids == (0, 1, 2, 3, 4)
    # What comes while the piece is on its way waits for a turn of its own.
    stream.put(Delta((5,), "x", None))
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    assert not reading.done()
    turns.wake()
    assert (await reading).token_ids == (5,)


async def test_a_turn_is_over_when_the_reader_comes_back_for_more():
    turns = ByHand()
    stream = stream_with(turns)
    stream.put(Delta((1,), "x", None))
    turns.wake()
    await anext(stream)
    assert turns.writing == 1
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    assert turns.writing == 0
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


async def test_a_reader_that_leaves_keeps_no_turn():
    turns = ByHand()
    stream = stream_with(turns)
    async with stream:
        stream.put(Delta((1,), "x", None))
        turns.wake()
        await anext(stream)
        stream.put(Delta((2,), "x", None))  # and now it waits for another
    assert turns.writing == 0
    turns.wake()
    assert turns.writing == 0


async def test_a_turn_that_comes_after_the_reader_was_cancelled_is_harmless():
    turns = ByHand()
    stream = stream_with(turns)
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    stream.put(Delta((1,), "x", None))
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    turns.wake()
