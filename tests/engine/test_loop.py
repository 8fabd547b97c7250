"""The engine thread: order of a turn, sleep and wake-up, exceptions, and the check of the books."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest

from engine.block_pool import BlockPool, Holder
from engine.errors import BlockAccountingError
from engine.loop import MAX_FAILURES, EngineLoop, check_books


class ScriptedRole:
    """Counts what it is asked for; each event says how many steps it is good for."""

    def __init__(self) -> None:
        self.steps_left = 0
        self.said: list[str] = []
        self.recovered: list[tuple[str, int | str | None]] = []
        self.checks = 0
        self.checked = threading.Event()
        self.turns = 0
        self.wake_at: float | None = None
        self.fail_steps = 0
        self.books_wrong = False
        self.mute = False

    def handle(self, event: int | str) -> None:
        if isinstance(event, str):
            raise ValueError(event)
        self.steps_left += event
        self.said.append(f"took {event}")

    def step(self, flush: Callable[[], None]) -> bool:
        self.turns += 1
        if self.wake_at is not None and time.monotonic() >= self.wake_at:
            self.wake_at = None
            self.said.append("woke up")
        if not self.steps_left:
            return False
        self.steps_left -= 1
        if self.fail_steps:
            self.fail_steps -= 1
            raise ValueError("step")
        self.said.append("stepped")
        return True

    def deadline(self) -> float | None:
        return self.wake_at

    def take_outputs(self) -> list[str]:
        if self.mute:
            self.checked.set()
            raise ValueError("mute")
        said, self.said = self.said, []
        return said

    def recover(self, error: Exception, event: int | str | None) -> None:
        self.recovered.append((str(error), event))
        self.said.append("recovered")

    def check(self) -> None:
        self.checks += 1
        self.checked.set()
        if self.books_wrong:
            raise BlockAccountingError("a block is missing")


class Running:
    def __init__(self) -> None:
        self.role = ScriptedRole()
        self.heard: list[list[str]] = []
        self.fatal: list[BaseException] = []
        self._news = asyncio.Condition()
        self.loop: EngineLoop[int | str, str] = EngineLoop(
            self.role, self._deliver, self.fatal.append, time.monotonic, check_after_idle_s=0.01
        )

    def _deliver(self, outputs: list[str]) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.heard.append(outputs)
        self._task = asyncio.ensure_future(self._notify())

    async def _notify(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10), self._news:
            await self._news.wait_for(condition)

    async def checked(self) -> None:
        """Until the books have been checked once more."""
        assert await asyncio.to_thread(self.role.checked.wait, 10)
        self.role.checked.clear()

    @property
    def words(self) -> list[str]:
        return [word for heard in self.heard for word in heard]


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    made = Running()
    made.loop.start()
    yield made
    await made.loop.stop(5.0)


async def test_what_was_decided_is_told_before_the_step(running: Running) -> None:
    running.loop.post(2)
    await running.checked()
    await running.until(lambda: running.words == ["took 2", "stepped", "stepped"])
    assert running.heard[:2] == [["took 2"], ["stepped"]]


async def test_idle_means_asleep_and_the_books_are_checked_once(running: Running) -> None:
    running.loop.post(1)
    await running.checked()
    turns = running.role.turns
    running.loop.post(0)
    await running.until(lambda: "took 0" in running.words)
    # At most the event's own turn; before it there was none, and no check without work since the last.
    assert running.role.turns <= turns + 1
    assert running.role.checks == 1


async def test_a_deadline_wakes_it_up(running: Running) -> None:
    running.role.wake_at = time.monotonic() + 0.02
    running.loop.post(0)
    await running.until(lambda: "woke up" in running.words)


async def test_a_failed_event_and_a_failed_step_are_recovered(running: Running) -> None:
    running.loop.post("bad")
    await running.until(lambda: "recovered" in running.words)
    running.role.fail_steps = 1
    running.loop.post(2)
    await running.checked()
    await running.until(lambda: running.words.count("stepped") == 1)
    assert running.role.recovered == [("bad", "bad"), ("step", None)]
    assert running.fatal == []


async def test_failures_in_a_row_are_fatal(running: Running) -> None:
    running.role.fail_steps = MAX_FAILURES
    running.loop.post(MAX_FAILURES)
    await running.until(lambda: running.words.count("recovered") == MAX_FAILURES)
    await running.loop.stop(5.0)
    assert [str(error) for error in running.fatal] == ["step"]


async def test_failures_with_good_turns_between_them_are_not(running: Running) -> None:
    for _ in range(MAX_FAILURES + 2):
        running.role.fail_steps = 1
        running.loop.post(2)
        await running.checked()
    assert len(running.role.recovered) == MAX_FAILURES + 2
    assert running.fatal == []


async def test_books_that_do_not_agree_are_fatal(running: Running) -> None:
    running.role.books_wrong = True
    running.loop.post(1)
    await running.checked()
    await running.loop.stop(5.0)
    assert [str(error) for error in running.fatal] == ["a block is missing"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_role_that_cannot_say_what_came_out_is_fatal(running: Running) -> None:
    running.role.mute = True
    running.loop.post(1)
    await running.checked()
    await running.loop.stop(5.0)
    assert [str(error) for error in running.fatal] == ["mute"]


def test_books_are_compared_with_those_who_hold_blocks() -> None:
    pool = BlockPool(8, 4, [0] * 8)
    pool.allocate(2, Holder.SEQUENCE)
    pool.allocate(3, Holder.TRANSFER)
    check_books(pool, {Holder.SEQUENCE: 2, Holder.TRANSFER: 3})
    with pytest.raises(BlockAccountingError, match=r"2 sequence references, but .* holds 1"):
        check_books(pool, {Holder.SEQUENCE: 1, Holder.TRANSFER: 3})
