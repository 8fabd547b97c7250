"""When readers of answers are woken: a few in each turn of the event loop.

Writing a piece of an answer to a client costs several times what taking a token from a worker does. If every
token woke its reader at once, a router that has too much to do would spend its time on pieces of one token,
while more of them wait in the workers' sockets. So tokens go first, and the time that they leave goes to
readers in the order in which they have something to read. While the loop is busy nearly all the time, a
reader waits besides until there is more to read (`piece_hold.py`). A router with little to do wakes everybody
within a millisecond.

gRPC has one queue for all that is done, so what workers send waits behind the pieces that are on their way.
Therefore not many are at a time; but those that clients do not take keep nobody else from writing: a few are
woken in every turn, whatever is on its way.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from router.piece_hold import PieceHold

MOST_A_TURN = 8
LEAST_A_TURN = 2
MOST_WRITING = 16
_TICK_S = 0.001
"""What uvloop rounds times to: a timer for less would be run again and again until the time has come."""


class ReaderTurns:
    """Of one event loop."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, cpu_s: Callable[[], float] = time.thread_time
    ) -> None:
        """cpu_s: that the loop's thread has taken so far."""
        self._waiting: deque[Callable[[], None]] = deque()
        self._held: deque[tuple[float, Callable[[], None]]] = deque()  # until when, and who
        self._clock, self._cpu_s = clock, cpu_s
        self._hold = PieceHold(clock(), cpu_s())
        self._writing = 0
        self._runs = False
        self._releases = False

    def wait(self, wake: Callable[[], None], *, at_once: bool = False) -> None:
        """`wake` is called when it is that reader's turn; then `done` when it has written.

        at_once: it is not held back: its client waits for the first token, or nothing more comes. Who is held
        back already asks again, and then is woken twice.
        """
        if self._hold.seconds:
            self._look()
        if at_once or not self._hold.seconds:
            self._line_up(wake)
            return
        self._held.append((self._clock() + self._hold.seconds, wake))
        if not self._releases:
            self._releases = True
            self._release_at(self._held[0][0])

    def done(self) -> None:
        """A reader that was woken has written what it had."""
        self._writing -= 1

    def _line_up(self, wake: Callable[[], None]) -> None:
        self._waiting.append(wake)
        if not self._runs:
            self._runs = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _release_at(self, when: float) -> None:
        asyncio.get_running_loop().call_later(max(_TICK_S, when - self._clock()), self._release)

    def _release(self) -> None:
        held = self._held
        soon = self._clock() + _TICK_S
        while held and held[0][0] <= soon:
            self._line_up(held.popleft()[1])
        self._releases = bool(held)
        if self._releases:
            self._release_at(held[0][0])

    def _look(self) -> None:
        self._hold.look(self._clock(), self._cpu_s())

    def _turn(self) -> None:
        self._look()
        waiting = self._waiting
        most = min(MOST_A_TURN, max(LEAST_A_TURN, MOST_WRITING - self._writing), len(waiting))
        self._writing += most
        for _ in range(most):
            waiting.popleft()()
        self._runs = bool(waiting)
        if self._runs:
            asyncio.get_running_loop().call_soon(self._turn)
