"""What has happened in the last while, from counters that only ever grow. A core."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from prelay.v1 import admin_pb2


@dataclass(frozen=True, slots=True)
class Recent:
    """Of the last `span_s` seconds. outcomes: of requests that ended, by SLO class."""

    span_s: float
    tokens: int
    outcomes: Mapping[str, Mapping[str, int]]

    def count(self, *which: str) -> int:
        """Requests of all classes with one of these outcomes; of all that ended, without any."""
        return sum(
            count
            for outcomes in self.outcomes.values()
            for outcome, count in outcomes.items()
            if not which or outcome in which
        )


class StatusWindow:
    """Keeps what a router has said for `span_s` seconds."""

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._seen: deque[tuple[float, admin_pb2.GetStatusResponse]] = deque()

    def add(self, now: float, status: admin_pb2.GetStatusResponse) -> Recent | None:
        """What has happened since the oldest status of the window; None with the first one."""
        if self._seen and status.uptime_s < self._seen[-1][1].uptime_s:
            self._seen.clear()  # another router, which counts from 0
        self._seen.append((now, status))
        # The oldest one is the last that is span_s old, so that the window has its full length.
        while len(self._seen) > 1 and now - self._seen[1][0] >= self._span_s:
            self._seen.popleft()
        since, oldest = self._seen[0]
        if now <= since:
            return None
        return Recent(
            now - since,
            status.tokens - oldest.tokens,
            {
                name: {
                    outcome: count - oldest.classes[name].outcomes[outcome]
                    if name in oldest.classes and outcome in oldest.classes[name].outcomes
                    else count
                    for outcome, count in one.outcomes.items()
                }
                for name, one in status.classes.items()
            },
        )
