"""Work of requests that wait at the gate, where they would go: so that those behind them look elsewhere."""

from __future__ import annotations


class Bookings:
    """Of one round of the gate, in which each request is asked for once, at one moment."""

    def __init__(self) -> None:
        self._now = float("-inf")
        self._requests: set[str] = set()
        self._seconds: dict[str, float] = {}

    def look(self, request_id: str, now: float) -> bool:
        """A decision about the request begins; with another moment, or the same request again, another round
        does. Returns whether it is another round."""
        if now == self._now and request_id not in self._requests:
            return False
        self._now = now
        self._requests.clear()
        self._seconds.clear()
        return True

    def book(self, request_id: str, worker_id: str, seconds: float) -> None:
        """The request waits for that worker, which it will keep busy for so long."""
        self._requests.add(request_id)
        self._seconds[worker_id] = self.booked_s(worker_id) + seconds

    def booked_s(self, worker_id: str) -> float:
        """Work on the worker of all that wait for it."""
        return self._seconds.get(worker_id, 0.0)
