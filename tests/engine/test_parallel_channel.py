"""Frames over a socket pair."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.parallel.channel import Channel, ChannelClosedError


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = (Channel(sock) for sock in socket.socketpair())
    yield one, other
    one.close()
    other.close()


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_frames_arrive_whole_and_in_order(frames: list[bytes]) -> None:
    one, other = (Channel(sock) for sock in socket.socketpair())
    for frame in frames:
        one.send(frame)
    assert [other.receive() for _ in frames] == frames
    one.close()
    other.close()


def test_a_frame_larger_than_any_buffer_arrives(ends: tuple[Channel, Channel]) -> None:
    frame = bytes(range(256)) * 40_000  # 10 MB: sent and received in many pieces
    sender = threading.Thread(target=ends[0].send, args=(frame,))
    sender.start()
    assert ends[1].receive() == frame
    sender.join()


def test_both_ends_may_talk_at_once(ends: tuple[Channel, Channel]) -> None:
    ends[0].send(b"there")
    ends[1].send(b"back")
    assert ends[1].receive() == b"there"
    assert ends[0].receive() == b"back"


def test_what_was_sent_before_closing_still_arrives(ends: tuple[Channel, Channel]) -> None:
    ends[0].send(b"last words")
    ends[0].close()
    assert ends[1].receive() == b"last words"
    with pytest.raises(ChannelClosedError):
        ends[1].receive()


@pytest.mark.parametrize("piece", [b"", b"\x05\x00", b"\x05\x00\x00\x00ab"])
def test_an_end_that_closes_in_the_middle_of_a_frame_is_noticed(piece: bytes) -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    theirs.sendall(piece)
    theirs.close()
    with pytest.raises(ChannelClosedError):
        channel.receive()
    channel.close()


def test_sending_to_a_closed_end_is_noticed(ends: tuple[Channel, Channel]) -> None:
    ends[1].close()
    with pytest.raises(ChannelClosedError):
        ends[0].send(b"anybody there?")


def test_a_receiver_that_waits_is_woken_when_the_other_end_closes(ends: tuple[Channel, Channel]) -> None:
    raised: list[Exception] = []

    def receive() -> None:
        try:
            ends[1].receive()
        except ChannelClosedError as error:
            raised.append(error)

    waiting = threading.Thread(target=receive)
    waiting.start()
    ends[0].close()
    waiting.join()
    assert len(raised) == 1


def test_silence_counts_as_an_end_only_where_signs_of_life_are_expected(
    ends: tuple[Channel, Channel],
) -> None:
    ends[1].expect_signs_of_life(0.02)
    ends[0].send(b"alive")
    assert ends[1].receive() == b"alive"
    with pytest.raises(ChannelClosedError, match="timed out"):
        ends[1].receive()
