"""The engine thread: takes events in, makes steps, hands results out, and sleeps when there is nothing to do.

One turn: take all events that have come -> the role handles them -> results out -> one step -> results out.
The first hand-out is there so that nobody waits for a step to learn what was decided before it.

Everything that a role decides and every KV block it owns is touched by this thread only. Others `post`
events; results go to the asyncio loop, one call for each batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

from engine.block_pool import BlockPool, Holder
from engine.errors import BlockAccountingError

Event = TypeVar("Event")
Output = TypeVar("Output")
EventIn = TypeVar("EventIn", contravariant=True)

MAX_FAILURES = 3
"""After an exception in so many turns in a row the engine is taken to be broken."""

_log = logging.getLogger(__name__)


class Role(Protocol[EventIn, Output]):
    """What a worker does with its engine. All methods are called from the engine thread."""

    def handle(self, event: EventIn) -> None:
        """Take one event into account."""
        ...

    def step(self, flush: Callable[[], None]) -> bool:
        """Do what time and state ask for, and run an engine step; False if there was none to run.

        flush: hands out what has come out so far; for what must not wait for the end of the step.
        """
        ...

    def deadline(self) -> float | None:
        """When `step` must be called even if no event comes; None if never."""
        ...

    def take_outputs(self) -> list[Output]:
        """What has come out since the last call, in order."""
        ...

    def recover(self, error: Exception, event: EventIn | None) -> None:
        """Fail and release the requests that an exception hit: those of `event`, or of the step (None)."""
        ...

    def check(self) -> None:
        """Raise if the books do not agree; called when there is nothing to do."""
        ...


class _Stop:
    """Ends the thread when it is taken from the inbox."""


class EngineLoop(Generic[Event, Output]):
    """A role running in a thread of its own.

    deliver: called in the asyncio loop that `start` was called from.
    on_fatal: called once, in the engine thread, when the engine cannot go on (MAX_FAILURES turns in a row
    failed, or the books do not agree); the thread ends.
    clock: the role's; seconds, monotonic.
    check_after_idle_s: the books are checked when there has been nothing to do for this long after some
    work, so that no request waits for it.
    """

    def __init__(
        self,
        role: Role[Event, Output],
        deliver: Callable[[list[Output]], None],
        on_fatal: Callable[[BaseException], None],
        clock: Callable[[], float],
        check_after_idle_s: float = 1.0,
    ) -> None:
        self._role = role
        self._deliver = deliver
        self._on_fatal = on_fatal
        self._clock = clock
        self._check_after_idle_s = check_after_idle_s
        self._inbox: queue.SimpleQueue[Event | _Stop] = queue.SimpleQueue()
        self._failures = 0
        self._unchecked = False

    def start(self) -> None:
        """Call it from the asyncio loop."""
        self._asyncio_loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="prelay-engine", daemon=True)
        self._thread.start()

    def post(self, event: Event) -> None:
        """From any thread; the engine wakes up for it."""
        self._inbox.put(event)

    async def stop(self, timeout_s: float) -> bool:
        """End the thread after the turn it is in; a step that takes longer than `timeout_s` is left alone.
        Returns whether the thread has ended."""
        self._inbox.put(_Stop())
        await asyncio.to_thread(self._thread.join, timeout_s)
        if self._thread.is_alive():
            _log.warning("event=engine_not_stopped timeout_s=%s: a step is still running", timeout_s)
            return False
        return True

    def _run(self) -> None:
        busy = False
        try:
            while (events := self._take(wait=not busy)) is not None:
                busy = self._turn(events)
        except Exception as error:
            _log.critical("event=engine_broken error=%r", error)
            try:
                self._flush()
            finally:  # also if it was this that broke
                self._on_fatal(error)

    def _take(self, wait: bool) -> list[Event] | None:
        """All events that have come; with `wait`, sleeps until one comes or a deadline. None: stop."""
        events: list[Event] = []
        timeout_s = self._sleep_s() if wait else 0.0
        try:
            while True:
                event = self._inbox.get(timeout=timeout_s) if wait else self._inbox.get_nowait()
                if isinstance(event, _Stop):
                    return None
                events.append(event)
                wait = False
        except queue.Empty:
            return events

    def _sleep_s(self) -> float | None:
        deadline = self._role.deadline()
        sleep_s = None if deadline is None else max(0.0, deadline - self._clock())
        if self._unchecked:
            sleep_s = self._check_after_idle_s if sleep_s is None else min(sleep_s, self._check_after_idle_s)
        return sleep_s

    def _turn(self, events: list[Event]) -> bool:
        """True if there may be another step to run right away."""
        failed = False
        for event in events:
            try:
                self._role.handle(event)
            except Exception as error:
                failed = True
                self._recover(error, event)
        self._flush()
        try:
            busy = self._role.step(self._flush)
        except Exception as error:
            failed = busy = True
            self._recover(error, None)
        self._flush()
        if failed:
            self._failures += 1
        elif events or busy:
            self._failures = 0
        self._unchecked = self._unchecked or busy
        if self._unchecked and not events and not busy:
            self._role.check()
            self._unchecked = False
        return busy

    def _recover(self, error: Exception, event: Event | None) -> None:
        _log.error("event=engine_turn_failed in=%s", "step" if event is None else type(event), exc_info=error)
        self._role.recover(error, event)
        if self._failures + 1 >= MAX_FAILURES:
            raise error

    def _flush(self) -> None:
        outputs = self._role.take_outputs()
        if outputs:
            # The loop is gone only when the process ends without having stopped us: nobody is left to tell.
            with contextlib.suppress(RuntimeError):
                self._asyncio_loop.call_soon_threadsafe(self._deliver, outputs)


def check_books(pool: BlockPool, references: Mapping[Holder, int]) -> None:
    """Raises BlockAccountingError unless the pool agrees with itself and with those who hold its blocks.

    references: to blocks that schedulers, the cache and hand-offs hold according to their own books.
    """
    pool.check()
    for holder, held in references.items():
        if pool.num_references(holder) != held:
            raise BlockAccountingError(
                f"the pool has {pool.num_references(holder)} {holder.value} references, "
                f"but who is responsible for them holds {held}"
            )
