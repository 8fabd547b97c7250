"""The way of an answer to its reader: merged while nobody reads, never longer than one delta."""

from __future__ import annotations

import asyncio

import pytest

from router.answer_stream import AnswerStream
from router.errors import StoppingError
from router.reader_turns import ReaderTurns
from router.requests import Delta, Finish, FinishReason


def stream_of(cancel=lambda: None, on_read=lambda: None):
    return AnswerStream(cancel, on_read, ReaderTurns())


def delta(token, text, *, last=False):
    return Delta((token,), text, Finish(FinishReason.STOP, 1, 1, None) if last else None)


async def test_what_is_not_read_is_merged():
    stream = stream_of()
    for index in range(1000):
        stream.put(delta(index, "x", last=index == 999))
    got = [one async for one in stream]
    assert len(got) == 1
    assert got[0].token_ids == tuple(range(1000))
    assert got[0].text == "x" * 1000
    assert got[0].finish is not None


async def test_what_is_unread_is_known_and_reading_is_told():
    read = []
    stream = stream_of(on_read=lambda: read.append(stream.unread_tokens))
    assert stream.unread_tokens == 0
    stream.put(delta(1, "a"))
    stream.put(delta(2, "b"))
    assert (stream.unread_tokens, read) == (2, [])
    await anext(stream)
    assert (stream.unread_tokens, read) == (0, [0])


async def test_a_waiting_reader_gets_each_delta():
    stream = stream_of()
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    stream.put(delta(1, "a"))
    assert (await reading).text == "a"
    stream.put(delta(2, "b", last=True))
    assert (await anext(stream)).text == "b"
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_an_error_comes_after_what_was_there_before_it():
    stream = stream_of()
    stream.put(delta(1, "a"))
    stream.fail(StoppingError())
    assert (await anext(stream)).text == "a"
    with pytest.raises(StoppingError):
        await anext(stream)


async def test_what_is_pushed_wakes_nobody_until_the_end():
    stream, pushed = stream_of(), []

    def write(one):
        pushed.append(one.text)
        return True

    pushing = asyncio.create_task(stream.push(write))
    await asyncio.sleep(0)
    for token, text in enumerate("abc"):
        stream.put(delta(token, text))
        await asyncio.sleep(0.01)
    assert pushed == ["a", "b", "c"]
    assert not pushing.done()
    assert stream.unread_tokens == 0
    stream.put(delta(3, "d", last=True))
    await pushing
    assert pushed == ["a", "b", "c"]
    assert (await anext(stream)).text == "d"
    await stream.push(write)  # there is nothing to wait for


async def test_a_writer_that_is_behind_stops_what_is_pushed():
    stream, pushed = stream_of(), []

    def write(one):
        pushed.append(one.text)
        return False

    pushing = asyncio.create_task(stream.push(write))
    await asyncio.sleep(0)
    for token, text in enumerate("abc"):
        stream.put(delta(token, text))
        await asyncio.sleep(0.01)
    await pushing
    assert pushed == ["a"]
    assert (await anext(stream)).text == "bc"


async def test_what_was_there_before_is_read_first_and_an_error_ends_what_is_pushed():
    stream, pushed = stream_of(), []

    def write(one):
        pushed.append(one.text)
        return True

    stream.put(delta(1, "a"))
    await asyncio.sleep(0.01)
    await stream.push(write)
    assert (await anext(stream)).text == "a"
    pushing = asyncio.create_task(stream.push(write))
    await asyncio.sleep(0)
    stream.put(delta(2, "b"))
    stream.fail(StoppingError())
    await pushing
    assert pushed == []
    assert (await anext(stream)).text == "b"
    with pytest.raises(StoppingError):
        await anext(stream)


async def test_what_the_writer_raises_the_reader_gets():
    stream = stream_of()

    def write(one):
        raise ConnectionResetError(one.text)

    pushing = asyncio.create_task(stream.push(write))
    await asyncio.sleep(0)
    stream.put(delta(1, "a"))
    with pytest.raises(ConnectionResetError, match="a"):
        await pushing


async def test_leaving_cancels():
    left = []
    async with stream_of(cancel=lambda: left.append("r")):
        pass
    assert left == ["r"]
