"""Frames between the leader and one rank: over a stream socket, each with its length in front."""

from __future__ import annotations

import socket
import struct

_LENGTH = struct.Struct("<I")


class ChannelClosedError(Exception):
    """The other end is gone."""


class Channel:
    """One end. One thread may send while another receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, frame: bytes) -> None:
        """Raises ChannelClosedError."""
        try:
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
                got = self._sock.recv_into(view)
            except OSError as error:
                raise ChannelClosedError(str(error)) from error
            if not got:
                raise ChannelClosedError("the other end has closed")
            view = view[got:]
        return bytes(buffer)
