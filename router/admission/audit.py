"""Whether those who were refused would have been late indeed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from router.admission.writers import Writers
from router.gate.goodput import GoodputGateQueue
from router.gate.readers import Readers
from router.requests import Request

_MOST_TOKENS = 2**18
_LOOKS = 16
_EVERY_S = 0.01


@dataclass(frozen=True, slots=True)
class _Refused:
    """stands_for: so many refusals, itself and those before it that were too many to be kept."""

    request: Request
    start_by: float
    stands_for: int


class RefusalAudit:
    """Keeps those who were refused until they could no longer be in time. Whoever finds workers that have
    room, in time, while the gate has nobody who could be, was refused in vain. What one of them would have
    taken of the idle readers is not there for the next one.

    Bounded: what is kept has `max_tokens` tokens at most.
    """

    def __init__(
        self, gate: GoodputGateQueue, readers: Readers, writers: Writers, max_tokens: int = _MOST_TOKENS
    ) -> None:
        self._gate = gate
        self._readers = readers
        self._writers = writers
        self._max_tokens = max_tokens
        self._refused: deque[_Refused] = deque()
        self._tokens = 0
        self._not_kept = 0
        self._taken_until = float("-inf")
        self._looked_at = float("-inf")

    def __len__(self) -> int:
        return len(self._refused)

    def refused(self, request: Request) -> None:
        """The request was refused, as it would be late."""
        if self._tokens + request.num_tokens > self._max_tokens:
            self._not_kept += 1
            return
        start_by = request.arrived_at + request.slo.limits.ttft_s - self._readers.read_s(request)
        self._refused.append(_Refused(request, start_by, 1 + self._not_kept))
        self._tokens += request.num_tokens
        self._not_kept = 0

    def in_vain(self, now: float) -> int:
        """How many more of them could be in time now. To be asked when all was placed that could be."""
        if not self._refused or now - self._looked_at < _EVERY_S:
            return 0
        self._looked_at = now
        idle = len(self._gate) == self._gate.num_late
        found = 0
        for _ in range(min(_LOOKS, len(self._refused))):
            one = self._refused.popleft()
            if now > one.start_by:
                self._tokens -= one.request.num_tokens
            elif idle and self._would_be_in_time(one.request, now):
                self._tokens -= one.request.num_tokens
                found += one.stands_for
            else:
                self._refused.append(one)
        return found

    def _would_be_in_time(self, request: Request, now: float) -> bool:
        begins_at = max(now, self._taken_until)
        ttft_s = begins_at - request.arrived_at + self._readers.ttft_s(request, now)
        if ttft_s > request.slo.limits.ttft_s or not self._writers.have_room(request, now):
            return False
        self._taken_until = begins_at + self._readers.read_s(request) / self._gate.rate
        return True
