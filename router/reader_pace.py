"""Holds answers up whose clients do not read them, so that neither the router nor a decode worker keeps more
and more for them.

    reading --more than limit unread--> full --at most half of it unread--> reading
                                         |
                                         +-- for too long --> the request ends (SlowReaderError)

While a stream is full, the decode worker that has it is told Pause: once for every placement, and not before
its first token, as it ignores what it does not have. What was under way still comes, so a little more than
the limit is unread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from router import commands
from router.live import LiveRequest


class ReaderPace:
    """Told of every delta that is put into a stream, and of every one that is read."""

    def __init__(
        self,
        limit_tokens: int,
        timeout_s: float,
        on_pause: Callable[[], None],
        on_timeout: Callable[[LiveRequest, float], None],
    ) -> None:
        """on_pause: called with every Pause. on_timeout: called with what has been full for `timeout_s`."""
        self._limit = limit_tokens
        self._timeout_s = timeout_s
        self._on_pause = on_pause
        self._on_timeout = on_timeout

    def wrote(self, live: LiveRequest) -> None:
        """More of the answer waits for its reader."""
        if not live.paced:
            return
        if live.unread_timer is None and live.stream.unread_tokens > self._limit:
            live.unread_timer = asyncio.get_running_loop().call_later(
                self._timeout_s, self._on_timeout, live, self._timeout_s
            )
        full = live.unread_timer is not None
        if full and live.decode is not None and live.decoding and not live.paused:
            live.paused = True
            live.decode.send(commands.pause(live.record.key))
            self._on_pause()

    def read(self, live: LiveRequest) -> None:
        """The reader has taken something."""
        if live.unread_timer is None or live.stream.unread_tokens > self._limit // 2:
            return
        self.ended(live)
        if live.paused and live.decode is not None:
            live.paused = False
            live.decode.send(commands.resume(live.record.key))

    def ended(self, live: LiveRequest) -> None:
        """Nobody has to be waited for any more."""
        if live.unread_timer is not None:
            live.unread_timer.cancel()
            live.unread_timer = None
