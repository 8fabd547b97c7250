"""Frames between the leader and one rank: over a stream socket, each with its length in front."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

_LENGTH = struct.Struct("<I")


class ChannelClosedError(Exception):
    """The other end is gone."""


class Channel:
    """One end. Several threads may send while another one receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()

    def expect_signs_of_life(self, silence_s: float) -> None:
        """From now on an other end that is silent, or takes nothing, for about this long counts as gone."""
        self._sock.settimeout(silence_s / 2)

    def send(self, frame: bytes) -> None:
        """Raises ChannelClosedError."""
        try:
            with self._sending:
                self._sock.sendall(_LENGTH.pack(len(frame)) + frame)
        except OSError as error:
            raise ChannelClosedError(str(error)) from error

    def receive(self) -> bytes:
        """The next frame; waits for it. Raises ChannelClosedError."""
        return self._read(_LENGTH.unpack(self._read(_LENGTH.size))[0])

    def close(self) -> None:
        self._sock.close()

    def _read(self, count: int) -> bytes:
        buffer = bytearray(count)
        view = memoryview(buffer)
        while view:
            try:
                got = self._receive_into(view)
            except OSError as error:
                raise ChannelClosedError(str(error)) from error
            if not got:
                raise ChannelClosedError("the other end has closed")
            view = view[got:]
        return bytes(buffer)

    def _receive_into(self, view: memoryview) -> int:
        # A second time: this process may have been stopped itself, and the other end with it.
        with contextlib.suppress(TimeoutError):
            return self._sock.recv_into(view)
        return self._sock.recv_into(view)
