"""When readers of answers are woken: a few in each turn of the event loop.

Writing a piece of an answer to a client costs several times what taking a token from a worker does. If every
token woke its reader at once, a router that has too much to do would spend its time on pieces of one token,
while more of them wait in the workers' sockets. So tokens go first, and the time that they leave goes to
readers in the order in which they have something to read: the less time there is, the longer each waits, and
the more tokens are in its piece. A router with little to do wakes everybody within a millisecond.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

READERS_A_TURN = 16


class ReaderTurns:
    """Of one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._runs = False

    def wait(self, wake: Callable[[], None]) -> None:
        """`wake` is called when it is that reader's turn."""
        self._waiting.append(wake)
        if not self._runs:
            self._runs = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        waiting = self._waiting
        for _ in range(min(READERS_A_TURN, len(waiting))):
            waiting.popleft()()
        self._runs = bool(waiting)
        if self._runs:
            asyncio.get_running_loop().call_soon(self._turn)
