"""The process that runs a deployment under the guard: `python -m cluster.child {serve,demo} RUN_DIRECTORY`.

It reads its order (one line of JSON) from standard input, and stops when that input ends: the guard wants it
to, or is gone. Whatever way it ends, it ends everything that it has started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError
from cluster.orders import Order
from cluster.process_tree import become_subreaper, kill_descendants

Main = Callable[[Order, Path], Coroutine[Any, Any, None]]
"""What is run: returns when it is done, raises ClusterError, and cleans up when it is cancelled."""


def run_child(main: Main, order: Order, run_directory: Path) -> int:
    """Run `main` until it ends or is asked to stop; returns the exit code. It leaves nothing behind."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(main(order, run_directory))

    def stop() -> None:
        loop.remove_reader(sys.stdin.fileno())
        # A second cancellation would interrupt the clean-up that the first has begun.
        if not task.cancelling():
            task.cancel()

    loop.add_signal_handler(signal.SIGTERM, stop)
    loop.add_reader(sys.stdin.fileno(), stop)
    try:
        loop.run_until_complete(task)
        code = 0
    except asyncio.CancelledError:
        code = 0
    except ClusterError as error:
        code = error.exit_code
        _report(error, order.debug)
    except Exception as error:
        code = 1
        _report(error, order.debug)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it, or the disk is full
            stream.flush()
    kill_descendants(timeout_s=1.5)
    return code


def _report(error: Exception, debug: bool) -> None:
    hint = "" if debug else "; --debug shows the traceback"
    unexpected = f"unexpected {type(error).__name__}: {error}{hint}"
    with contextlib.suppress(OSError):
        if debug:
            traceback.print_exception(error)
        print(f"prelay: error: {error if isinstance(error, ClusterError) else unexpected}", file=sys.stderr)


def main() -> None:
    """Entry of `python -m cluster.child`."""
    become_subreaper()
    name, run_directory = sys.argv[1], Path(sys.argv[2]).absolute()
    order = Order.from_json(sys.stdin.buffer.readline())
    # Ray puts its driver's directory on its workers' path: what lies where the user stands is not to be
    # imported there.
    os.chdir(run_directory)
    logging.basicConfig(
        level=logging.INFO if order.debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    if name == "serve":
        from cluster.serve import serve as run
    else:
        from cluster.demo.run import demo as run
    code = run_child(run, order, run_directory)
    if code != 1:
        # The guard does this too, if it still lives.
        shutil.rmtree(run_directory, ignore_errors=True)
    # Not sys.exit: a thread inside ray.init, whose processes are gone, would be waited for.
    os._exit(code)


if __name__ == "__main__":
    main()
