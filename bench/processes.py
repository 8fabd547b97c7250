"""Processes that are measured: each of its own, on a core of its own, and asked over a pipe.

`serve(connection, *arguments)` runs in the process. It sends what the other side takes, and answers what it
is asked, until it receives None; whatever it raises is raised at the other side as MeasurementError.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from bench.errors import MeasurementError

_END_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Failure:
    text: str


class Remote:
    """One such process. serve: a function that a fresh process can import."""

    def __init__(self, name: str, core: int, serve: Callable[..., None], *arguments: Any) -> None:
        self._name = name
        self._connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")  # threads and locks of ours must not come along
        self._process = context.Process(target=_run, args=(theirs, serve, arguments), name=name, daemon=True)
        ours = os.sched_getaffinity(0)
        # Pinned from its first instruction: libraries look for cores when they are imported.
        os.sched_setaffinity(0, {core})
        try:
            self._process.start()
        finally:
            os.sched_setaffinity(0, ours)
            theirs.close()

    def ask(self, question: Any) -> Any:
        """Send, and wait for the answer. Raises MeasurementError."""
        self.tell(question)
        return self.take()

    def tell(self, question: Any) -> None:
        """Send; `take` has the answer. Raises MeasurementError."""
        try:
            self._connection.send(question)
        except OSError as error:
            raise self._has_ended() from error

    def take(self) -> Any:
        """Wait for what the process sends by itself. Raises MeasurementError."""
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._has_ended() from error
        if isinstance(answer, _Failure):
            raise MeasurementError(f"the process {self._name} failed:\n{answer.text}")
        return answer

    def stop(self) -> None:
        """End the process, if need be by force."""
        with contextlib.suppress(OSError):  # it has ended
            self._connection.send(None)
        self._process.join(_END_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()

    def _has_ended(self) -> MeasurementError:
        self._process.join(_END_TIMEOUT_S)
        return MeasurementError(
            f"the process {self._name} has ended with exit code {self._process.exitcode}; its last words, "
            "if there are any, are on standard error"
        )


def _run(connection: Connection, serve: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for who asks us, and ends us then
    try:
        with contextlib.suppress(EOFError):  # nobody asks any more
            serve(connection, *arguments)
    except Exception:
        connection.send(_Failure(traceback.format_exc()))
