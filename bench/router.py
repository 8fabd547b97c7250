"""`prelay bench router`: what one router process carries, and how long it keeps tokens and decides.

One real router process on a core of its own, lean workers and clients in two processes on the other core;
everything between them are real sockets. Each round measures in turn, so that what drifts hits all alike:

    requests   streams of one-token answers, as many as come back: requests/s
    tokens     rates that grow until the router falls behind: tokens/s
    added      at half of that rate: from a worker's sending of a token to its arrival at the client
    decisions  the router's cores alone, with 10, 100 and 1,000 workers in view
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench import router_clients, router_workers
from bench.errors import MeasurementError
from bench.processes import Remote
from bench.router_decisions import measure as measure_decisions
from bench.router_process import MODEL, RouterProcess, running_router
from bench.router_stamp import write_checkpoint
from bench.timing import Spread

FRONTS = ("grpc", "http")
NUM_PREFILL, NUM_DECODE = 4, 8
_SETTLE_S = 1.0
_CARRIED = 0.97
"""Of what workers sent: what must have arrived, so that the router has not fallen behind."""
_FIRST_RATE, _GROWTH = 4_000.0, 1.3
_BUSY = 0.9


@dataclass(frozen=True, slots=True)
class Settings:
    """streams: that are open at once. answer_tokens: of each answer. seconds: of each measurement."""

    rounds: int
    seconds: float
    streams: int
    answer_tokens: int
    workers_in_view: tuple[int, ...]
    decisions: int


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement. shares: of a core, of the router's process and of the clients and workers together."""

    sent_s: float
    tokens_s: float
    requests_s: float
    tokens_a_piece: float
    p50_ms: float
    p99_ms: float
    router_share: float
    others_share: float

    @property
    def is_carried(self) -> bool:
        return self.tokens_s >= _CARRIED * self.sent_s

    @property
    def others_were_short(self) -> bool:
        """Whether the figure says more about clients and workers than about the router."""
        return self.others_share > _BUSY and self.router_share < _BUSY

    @property
    def nobody_was_busy(self) -> bool:
        return self.others_share <= _BUSY and self.router_share < _BUSY

    def to_json(self) -> dict[str, Any]:
        return {
            "sent_s": self.sent_s,
            "tokens_s": self.tokens_s,
            "requests_s": self.requests_s,
            "tokens_a_piece": self.tokens_a_piece,
            "added_ms": {"p50": self.p50_ms, "p99": self.p99_ms},
            "router_cpu_share": self.router_share,
            "others_cpu_share": self.others_share,
            "router_us_per_token": 1e6 * self.router_share / max(1.0, self.tokens_s),
        }


@dataclass(slots=True)
class _Front:
    """What was measured of one front end, a value a round."""

    requests: list[Point] = field(default_factory=list)
    climbs: list[list[Point]] = field(default_factory=list)
    added: list[Point] = field(default_factory=list)

    @property
    def limits(self) -> list[Point]:
        """Points at which something was at its limit."""
        return [*self.requests, *(points[-1] for points in self.climbs)]


def measure(settings: Settings, show: Callable[[float, str], None]) -> dict[str, Any]:
    """show: told how much of it is done, 0 to 1, and what is next. Raises MeasurementError."""
    cores = sorted(os.sched_getaffinity(0))
    fronts = {name: _Front() for name in FRONTS}
    decisions: dict[int, list[Any]] = {number: [] for number in settings.workers_in_view}
    with _bench(cores[0], cores[-1]) as bench:
        for number in range(settings.rounds):
            for place, (name, front) in enumerate(fronts.items()):
                done = (number + place / (len(FRONTS) + 1)) / settings.rounds
                show(done, f"round {number + 1}, {name}: requests")
                front.requests.append(bench.requests(name, settings))
                show(done, f"round {number + 1}, {name}: tokens")
                bench.begin(name, settings.streams, settings.answer_tokens)
                from_rate = 0.7 * _best(front.climbs[-1]) if front.climbs else _FIRST_RATE
                front.climbs.append(climb(lambda rate: bench.point(rate, settings), from_rate))
                carried = _best(front.climbs[-1])
                if not carried:
                    raise MeasurementError(
                        f"{name}: not even {front.climbs[-1][-1].sent_s:.0f} tokens/s all arrive; try fewer "
                        "--streams, and nothing else on this machine"
                    )
                front.added.append(bench.point(carried / 2, settings))
                bench.end()
            show((number + len(FRONTS) / (len(FRONTS) + 1)) / settings.rounds, "decisions")
            for workers, found in decisions.items():
                found.append(measure_decisions(workers, settings.decisions, number))
    return _result(fronts, decisions)


def climb(point: Callable[[float], Point], rate: float) -> list[Point]:
    """Points at rates that grow until one is not carried any more; falls first if `rate` is not."""
    points = [point(rate)]
    while not points[-1].is_carried and rate > 1.0:
        rate /= _GROWTH
        points.append(point(rate))
    if len(points) > 1:
        return points
    while points[-1].is_carried:
        rate *= _GROWTH
        points.append(point(rate))
        if points[-1].sent_s < points[-2].sent_s:
            break  # the workers send no faster
    return points


def _best(points: list[Point]) -> float:
    """Tokens/s that arrived, at the best of those that were carried."""
    carried = [point.tokens_s for point in points if point.is_carried]
    return max(carried, default=0.0)


class _Bench:
    """The three processes."""

    def __init__(self, router: RouterProcess, workers: Remote, clients: Remote) -> None:
        self._router = router
        self._workers = workers
        self._clients = clients
        self._streams = 0

    def requests(self, front: str, settings: Settings) -> Point:
        """Of one-token answers."""
        self.begin(front, settings.streams // 4 or 1, 1)
        point = self._point(settings.seconds)
        self.end()
        return point

    def begin(self, front: str, streams: int, answer_tokens: int) -> None:
        self._streams = streams
        self._workers.ask(router_workers.Pace(streams / _FIRST_RATE))
        self._clients.ask(router_clients.Begin(front, streams, answer_tokens))
        time.sleep(_SETTLE_S)

    def end(self) -> None:
        self._clients.ask(router_clients.End())
        time.sleep(_SETTLE_S)

    def point(self, rate: float, settings: Settings) -> Point:
        """At so many tokens/s."""
        self._workers.ask(router_workers.Pace(self._streams / rate))
        time.sleep(_SETTLE_S / 2)
        return self._point(settings.seconds)

    def _point(self, seconds: float) -> Point:
        sent: router_workers.Sent = self._workers.ask("sent")
        router_s = self._router.cpu_s()
        seen: router_clients.Seen = self._clients.ask(router_clients.Watch(seconds))
        router_s = self._router.cpu_s() - router_s
        sent_after: router_workers.Sent = self._workers.ask("sent")
        wall_s = sent_after.at - sent.at
        if seen.error or not seen.tokens:
            raise MeasurementError(f"nothing can be measured: {seen.error or 'no token came'}")
        workers_share = (sent_after.cpu_s - sent.cpu_s) / wall_s
        return Point(
            sent_s=(sent_after.tokens - sent.tokens) / wall_s,
            tokens_s=seen.tokens / seen.seconds,
            requests_s=seen.requests / seen.seconds,
            tokens_a_piece=seen.tokens / max(1, seen.pieces),
            p50_ms=seen.p50_ms,
            p99_ms=seen.p99_ms,
            router_share=router_s / wall_s,
            others_share=workers_share + seen.cpu_s / seen.seconds,
        )


@contextmanager
def _bench(router_core: int, other_core: int) -> Iterator[_Bench]:
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory))
        with running_router(Path(directory), router_core) as router:
            workers = Remote("workers", other_core, router_workers.serve, NUM_PREFILL, NUM_DECODE)
            try:
                router.register(workers.take())
                clients = Remote("clients", other_core, router_clients.serve, router.grpc, router.http, MODEL)
                try:
                    yield _Bench(router, workers, clients)
                finally:
                    clients.stop()
            finally:
                workers.stop()


def _result(fronts: dict[str, _Front], decisions: dict[int, list[Any]]) -> dict[str, Any]:
    tokens = {name: Spread.of([_best(points) for points in one.climbs]) for name, one in fronts.items()}
    requests = {name: Spread.of([point.requests_s for point in one.requests]) for name, one in fronts.items()}
    p50 = {name: Spread.of([point.p50_ms for point in one.added]) for name, one in fronts.items()}
    p99 = {name: Spread.of([point.p99_ms for point in one.added]) for name, one in fronts.items()}
    worse = max(FRONTS, key=lambda name: p99[name].median)
    return {
        "requests_s": min(spread.median for spread in requests.values()),
        "tokens_s": {name: spread.median for name, spread in tokens.items()},
        "added_ms": {"p50": p50[worse].median, "p99": p99[worse].median},
        "decision_ms_p99": {
            str(workers): median(times.decision_p99 for times in found)
            for workers, found in decisions.items()
        },
        "requests_s_spread": {name: spread.to_json() for name, spread in requests.items()},
        "tokens_s_spread": {name: spread.to_json() for name, spread in tokens.items()},
        "added_ms_spread": {
            name: {"p50": p50[name].to_json(), "p99": p99[name].to_json()} for name in FRONTS
        },
        "decision_ms": {
            str(workers): {
                key: Spread.of([getattr(times, key) for times in found]).to_json()
                for key in ("decision_p50", "decision_p99", "turn_p50", "turn_p99")
            }
            for workers, found in decisions.items()
        },
        "points": {
            name: {
                "requests": [point.to_json() for point in one.requests],
                "climbs": [[point.to_json() for point in points] for points in one.climbs],
                "added": [point.to_json() for point in one.added],
            }
            for name, one in fronts.items()
        },
        "notes": notes({name: one.limits for name, one in fronts.items()}),
    }


def notes(limits: dict[str, list[Point]]) -> list[str]:
    """What to bear in mind. limits: by front end, the points at which something was at its limit."""
    said = []
    for name, points in limits.items():
        if any(point.others_were_short for point in points):
            said.append(
                f"{name}: clients and workers had no time left on their core, while the router had: it "
                "carries more than was measured"
            )
        elif any(point.nobody_was_busy for point in points):
            said.append(
                f"{name}: neither the router nor the clients had their core to themselves: something else "
                "ran there, so a quiet machine would show more"
            )
    return said
