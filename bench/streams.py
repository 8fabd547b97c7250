"""`prelay bench streams`: thousands of streams through one router for minutes, with clients that leave at
random.

The processes are those of `prelay bench router`. What is looked for is what grows: memory and descriptors of
the router, and the time for which it keeps tokens; and what is left behind when everybody has gone.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from prelay.v1 import admin_pb2, admin_pb2_grpc

from bench import router_clients, router_workers
from bench.errors import MeasurementError
from bench.processes import Remote
from bench.router_process import MODEL, RouterProcess, running_router
from bench.router_stamp import write_checkpoint

NUM_PREFILL, NUM_DECODE = 4, 8
_LOOK_S = 10.0
_WARM_SHARE = 0.2
"""Of the time, at its beginning: caches and pools fill, so it says nothing of what grows."""
_GONE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Settings:
    """streams: that are open at once, half of them over each front end. tokens_s: of all together. leaves: of
    the answers, 0 to 1, whose client hangs up before their end."""

    streams: int
    seconds: float
    answer_tokens: int
    tokens_s: float
    leaves: float


@dataclass(frozen=True, slots=True)
class Look:
    """The router at one moment, and what its clients saw in the seconds before."""

    at_s: float
    memory_mb: float
    descriptors: int
    live: int
    requests: int
    left: int
    tokens_s: float
    p50_ms: float
    p99_ms: float
    cpu_share: float


def measure(settings: Settings, show: Callable[[float, str], None]) -> dict[str, Any]:
    """show: told how much of it is done, 0 to 1, and what is seen. Raises MeasurementError."""
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_checkpoint(directory)
        router = stack.enter_context(running_router(directory, cores[0]))
        seats = -(
            -2 * settings.streams // NUM_DECODE
        )  # twice as many as are taken: places are not what is tried
        workers = Remote("workers", cores[-1], router_workers.serve, NUM_PREFILL, NUM_DECODE, seats)
        stack.callback(workers.stop)
        router.register(workers.take())
        before = _memory_mb(router)
        crowds = []
        for front in ("grpc", "http"):
            crowds.append(Remote(front, cores[-1], router_clients.serve, router.grpc, router.http, MODEL))
            stack.callback(crowds[-1].stop)
        workers.ask(router_workers.Pace(settings.streams / settings.tokens_s))
        for front, crowd in zip(("grpc", "http"), crowds, strict=True):
            half = (settings.streams + (front == "grpc")) // 2
            if half:
                crowd.ask(router_clients.Begin(front, half, settings.answer_tokens, settings.leaves))
        looks = _watch(router, crowds, settings, show)
        for crowd in crowds:
            crowd.ask(router_clients.End())
        show(1.0, "waiting until all are gone")
        left_behind = _all_gone(router)
        return _result(settings, looks, before, _memory_mb(router), left_behind)


def _watch(
    router: RouterProcess, crowds: list[Remote], settings: Settings, show: Callable[[float, str], None]
) -> list[Look]:
    looks: list[Look] = []
    began = time.monotonic()
    while (at_s := time.monotonic() - began) < settings.seconds:
        cpu_s = router.cpu_s()
        watch = router_clients.Watch(min(_LOOK_S, settings.seconds - at_s + 0.1))
        for crowd in crowds:
            crowd.tell(watch)
        seen: list[router_clients.Seen] = [crowd.take() for crowd in crowds]
        if error := next((one.error for one in seen if one.error), ""):
            raise MeasurementError(f"a stream failed: {error}")
        took_s = max(one.seconds for one in seen)
        looks.append(
            Look(
                time.monotonic() - began,
                _memory_mb(router),
                len(os.listdir(f"/proc/{router.pid}/fd")),
                _live(router),
                sum(one.requests for one in seen),
                sum(one.left for one in seen),
                sum(one.tokens for one in seen) / took_s,
                max(one.p50_ms for one in seen),
                max(one.p99_ms for one in seen),
                (router.cpu_s() - cpu_s) / took_s,
            )
        )
        last = looks[-1]
        show(
            min(1.0, last.at_s / settings.seconds),
            f"{last.live} streams, {last.tokens_s:.0f} tokens/s, {last.memory_mb:.0f} MB, "
            f"p99 {last.p99_ms:.0f} ms",
        )
    return looks


def slope_mb_min(looks: list[Look]) -> float:
    """Of the router's memory after the beginning, by least squares; 0 of fewer than three looks."""
    settled = [look for look in looks if look.at_s >= _WARM_SHARE * looks[-1].at_s]
    if len(settled) < 3:
        return 0.0
    slope, _ = np.polyfit([look.at_s / 60 for look in settled], [look.memory_mb for look in settled], 1)
    return float(slope)


def _result(
    settings: Settings, looks: list[Look], before_mb: float, after_mb: float, left_behind: int
) -> dict[str, Any]:
    p99 = [look.p99_ms for look in looks]
    return {
        "streams": settings.streams,
        "seconds": looks[-1].at_s,
        "tokens_s": float(np.median([look.tokens_s for look in looks])),
        "answers": sum(look.requests for look in looks),
        "left": sum(look.left for look in looks),
        "added_ms": {
            "p50": float(np.median([look.p50_ms for look in looks])),
            "p99": float(np.median(p99)),
            "p99_worst": max(p99),
        },
        "memory_mb": {
            "before": before_mb,
            "most": max(look.memory_mb for look in looks),
            "after": after_mb,
            "slope_per_min": slope_mb_min(looks),
        },
        "descriptors": max(look.descriptors for look in looks),
        "router_cpu_share": float(np.median([look.cpu_share for look in looks])),
        "left_behind": left_behind,
        "looks": [
            {"at_s": look.at_s, "memory_mb": look.memory_mb, "live": look.live, "p99_ms": look.p99_ms}
            for look in looks
        ],
    }


def _memory_mb(router: RouterProcess) -> float:
    try:
        status = Path(f"/proc/{router.pid}/status").read_text()
    except OSError as error:
        raise MeasurementError("the router has ended; its last words are on standard error") from error
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def _live(router: RouterProcess) -> int:
    with grpc.insecure_channel(router.admin) as channel:
        try:
            status = admin_pb2_grpc.RouterAdminStub(channel).GetStatus(
                admin_pb2.GetStatusRequest(), timeout=30
            )
        except grpc.RpcError as error:
            raise MeasurementError(f"the router does not say how it is: {error}") from error
    return int(status.live_requests)


def _all_gone(router: RouterProcess) -> int:
    """Requests that are still there some seconds after all clients have gone."""
    deadline = time.monotonic() + _GONE_TIMEOUT_S
    while (live := _live(router)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return live
