"""`python -m router SETTINGS_JSON`: one router process.

Prints one line of JSON on stdout when it listens: {"http": "host:port", "grpc": ..., "metrics": ..., "admin":
...}. Stops on SIGTERM, on SIGINT, and at the end of stdin (so it never outlives whoever started it). Exit
codes: 0 stopped as told, 2 wrong settings or checkpoint, 3 an address is taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict

import uvloop

from engine.errors import EngineError
from router import garbage
from router.app import Router
from router.errors import AddressTakenError, SettingsError
from router.settings import RouterSettings

_FEW_DESCRIPTORS = 4096
_log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Runs until told to stop; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m router SETTINGS_JSON", file=sys.stderr)
        return 2
    try:
        settings = RouterSettings.from_json(arguments[0])
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    logging.basicConfig(
        level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    _raise_descriptor_limit()
    _take_turns_on_one_core()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings))
    except (SettingsError, EngineError) as error:
        print(error, file=sys.stderr)
        return 2
    except AddressTakenError as error:
        print(error, file=sys.stderr)
        return 3
    return 0


async def _serve(settings: RouterSettings) -> None:
    loop = asyncio.get_running_loop()
    told_to_stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_stop.set)
    router = Router(settings)
    addresses = await router.start()
    garbage.settle()
    print(json.dumps(asdict(addresses)), flush=True)
    threading.Thread(target=_wait_for_stdin_to_end, args=(loop, told_to_stop), daemon=True).start()
    await told_to_stop.wait()
    await router.stop()


def _take_turns_on_one_core() -> None:
    """With one core only, threads wait for each other instead of interrupting each other.

    gRPC's threads wake for every message, and hand over to the loop whatever there is by then. Where they
    interrupt the loop, on the only core that both have, a request costs dozens of switches; where they wait
    until the loop has nothing to do, a few. With more cores they run beside it.
    """
    if len(os.sched_getaffinity(0)) == 1:
        with contextlib.suppress(OSError):  # where the system forbids it, it serves a little less
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # of later threads, too


def _raise_descriptor_limit() -> None:
    """Each connection takes one; when there are none left, newcomers are turned away."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < _FEW_DESCRIPTORS:
        _log.warning(
            "event=few_descriptors limit=%d message='with more connections than that, new ones are turned "
            "away: raise it (ulimit -Hn)'",
            hard,
        )


def _wait_for_stdin_to_end(loop: asyncio.AbstractEventLoop, told_to_stop: asyncio.Event) -> None:
    # os.read and not sys.stdin: a daemon thread must not hold that object's lock when the interpreter exits.
    while os.read(0, 4096):
        pass
    if not loop.is_closed():
        loop.call_soon_threadsafe(told_to_stop.set)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
