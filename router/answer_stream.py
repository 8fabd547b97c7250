"""The way of one answer from the dispatcher to the front end that asked for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from router.errors import RouterError
from router.reader_turns import ReaderTurns
from router.requests import Delta


class AnswerStream:
    """An async iterator of deltas. What the reader has not taken yet comes as one delta, when it is the
    reader's turn (`reader_turns.py`).

    How much that is, is bounded from outside (`reader_pace.py`): `unread_tokens` says how much there is, and
    `on_read` when it has been taken. Ends after the delta that carries `finish`; raises the RouterError that
    ended the request instead. Use it as an async context manager: leaving it early cancels the request.
    """

    def __init__(self, cancel: Callable[[], None], on_read: Callable[[], None], turns: ReaderTurns) -> None:
        """cancel: called when the reader leaves; must be harmless when the request has ended, as must
        on_read."""
        self._cancel = cancel
        self._on_read = on_read
        self._turns = turns
        self._pending: list[Delta] = []
        self._unread_tokens = 0
        self._error: RouterError | None = None
        self._ended = False
        self._is_first = True
        self._waits_for_turn = False
        self._turn: asyncio.Future[None] | None = None  # while the reader waits for it
        self._push_to: Callable[[Delta], bool] | None = None
        self._may_read = False
        self._has_turn = False  # and has not given it back
        self._left = False

    @property
    def unread_tokens(self) -> int:
        """Tokens that the reader has not taken yet."""
        return self._unread_tokens

    def put(self, delta: Delta) -> None:
        """More of the answer."""
        self._pending.append(delta)
        self._unread_tokens += len(delta.token_ids)
        self._ask_for_turn(at_once=self._is_first or delta.finish is not None)
        self._is_first = False

    def fail(self, error: RouterError) -> None:
        """The request ended without a complete answer; what is pending still goes out first."""
        self._error = error
        self._ask_for_turn(at_once=True)

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        if not self._may_read:
            self._give_turn_back()
        while not self._may_read and not self._ended:
            self._turn = asyncio.get_running_loop().create_future()
            await self._turn
        self._may_read = False
        if self._pending:
            delta = self._take_pending()
            self._ended = delta.finish is not None
            self._may_read = self._error is not None  # which is due next
            return delta
        if self._ended:
            raise StopAsyncIteration
        assert self._error is not None
        raise self._error

    async def push(self, write: Callable[[Delta], bool]) -> None:
        """From now on `write` is called with each delta when it is the reader's turn, which costs less than
        waking the reader for it. Returns when the reader has to read on: `write` has returned False, or what
        comes next is the end of the answer or an error. Raises what `write` raises."""
        if self._may_read or self._ended:
            return
        self._give_turn_back()
        self._push_to = write
        self._turn = asyncio.get_running_loop().create_future()
        try:
            await self._turn
        finally:
            self._push_to = None

    def _take_pending(self) -> Delta:
        pending, self._pending, self._unread_tokens = self._pending, [], 0
        delta = pending[0] if len(pending) == 1 else Delta.joined(pending)
        self._on_read()
        return delta

    def _ask_for_turn(self, *, at_once: bool) -> None:
        if at_once or not self._waits_for_turn:
            self._waits_for_turn = True
            self._turns.wait(self._take_turn, at_once=at_once)

    def _take_turn(self) -> None:
        self._waits_for_turn = False
        self._give_turn_back()  # of two it needs one
        self._has_turn = True
        self._may_read = bool(self._pending) or self._error is not None
        if self._left or not self._may_read:
            self._give_turn_back()
        elif self._turn is not None and not self._turn.done():
            if self._push_to is None or self._error is not None or self._pending[-1].finish is not None:
                self._turn.set_result(None)
            else:
                self._push(self._push_to, self._turn)

    def _push(self, write: Callable[[Delta], bool], reader: asyncio.Future[None]) -> None:
        self._may_read = False
        try:
            if not write(self._take_pending()):
                reader.set_result(None)
        except asyncio.CancelledError:
            reader.cancel()
        except Exception as error:
            reader.set_exception(error)
        self._give_turn_back()

    def _give_turn_back(self) -> None:
        if self._has_turn:
            self._has_turn = False
            self._turns.done()

    async def __aenter__(self) -> AnswerStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._left = True
        self._give_turn_back()
        self._cancel()
