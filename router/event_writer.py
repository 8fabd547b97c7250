"""Writes events to a streaming HTTP client without a task of its own.

What aiohttp writes it hands to the socket at once, and only where a client is behind does it wait. So the
coroutine is run here up to where it would wait, nearly always its end; what is left of it is the task's that
the response belongs to.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from types import coroutine
from typing import Any

from aiohttp import web


class EventWriter:
    """Of one response that is prepared, in whose task nothing is being written."""

    def __init__(self, response: web.StreamResponse) -> None:
        self._response = response
        self._left: tuple[Coroutine[Any, Any, None], Any] | None = None  # and what it waits for

    def write(self, events: bytes) -> bool:
        """Writes now; False if the client is behind, so that `finish` is to be awaited before the next one.

        Raises what `StreamResponse.write` raises: ConnectionError, if the client is gone.
        """
        if not events:
            return True
        writing = self._response.write(events)
        try:
            waits_for = writing.send(None)
        except StopIteration:
            return True
        self._left = (writing, waits_for)
        return False

    async def finish(self) -> None:
        """Until the client has taken enough of what was written."""
        if self._left is not None:
            left, self._left = self._left, None
            await _run_on(*left)


@coroutine
def _run_on(writing: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """The rest of a coroutine that has been run up to where it waits for something."""
    try:
        yield waits_for
    except BaseException:
        writing.close()
        raise
    yield from writing.__await__()
