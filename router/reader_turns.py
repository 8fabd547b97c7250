"""When readers of answers are woken: a few in each turn of the event loop.

Writing a piece of an answer to a client costs several times what taking a token from a worker does. If every
token woke its reader at once, a router that has too much to do would spend its time on pieces of one token,
while more of them wait in the workers' sockets. So tokens go first, and the time that they leave goes to
readers in the order in which they have something to read: the less time there is, the longer each waits, and
the more tokens are in its piece. A router with little to do wakes everybody within a millisecond.

gRPC has one queue for all that is done, so what workers send waits behind the pieces that are on their way.
Therefore not many are at a time; but those that clients do not take keep nobody else from writing: a few are
woken in every turn, whatever is on its way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

MOST_A_TURN = 8
LEAST_A_TURN = 2
MOST_WRITING = 16


class ReaderTurns:
    """Of one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._writing = 0
        self._runs = False

    def wait(self, wake: Callable[[], None]) -> None:
        """`wake` is called when it is that reader's turn; then `done` when it has written."""
        self._waiting.append(wake)
        if not self._runs:
            self._runs = True
            asyncio.get_running_loop().call_soon(self._turn)

    def done(self) -> None:
        """A reader that was woken has written what it had."""
        self._writing -= 1

    def _turn(self) -> None:
        waiting = self._waiting
        most = min(MOST_A_TURN, max(LEAST_A_TURN, MOST_WRITING - self._writing), len(waiting))
        self._writing += most
        for _ in range(most):
            waiting.popleft()()
        self._runs = bool(waiting)
        if self._runs:
            asyncio.get_running_loop().call_soon(self._turn)
