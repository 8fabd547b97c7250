"""The gate of the goodput policy: who can be in time goes first, earliest deadline first.

A request stands in one of four lines:

    resumed    part of its answer is out: its reader waits, so it goes before all others, as it arrived
    kept       all of these can be in time: by priority, then earliest deadline first (slack-EDF)
    given up   could be in time, but not with all the others: chosen by Moore-Hodgson, as fairness allows
    late       can no longer be in time

Those given up and the late ones go when nobody who is kept can, by priority, then shortest first. Who is kept
is planned anew every few milliseconds; until then, whoever comes counts as kept.

What late ones are guaranteed: the one that has waited longest goes before those in time each time that
`1 / LATE_SHARE` times its own work has been placed (`is_its_turn`). So each goes in the end, after no more
than that for all that came before it, and late ones take no more than `LATE_SHARE` of what readers do in
overload.

A request that could not be in time if nothing else were there has no deadline to keep, and yet does not wait
like one that is late: it is planned for to be served soon, and the first to be given up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

from router.gate.drain import DrainRate
from router.gate.fairness import Fairness, length_bin
from router.gate.line import Line
from router.gate.moore_hodgson import PLAIN
from router.gate.plan import hold_of, make_plan
from router.gate.readers import Readers
from router.gate.waiting import Place, Waiting
from router.requests import Request

LATE_SHARE = 0.05
_CANDIDATES = 4
_LOOKS = 16
_PLAN_EVERY_S = 0.005
_PLAN_EVERY_S_EACH = 100e-6  # a plan costs two microseconds or three for each that waits


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a request could expect at the gate: times to its first token.

    ttft_s: if all that are due before it go before it. kept_ttft_s: if only those do that are kept, and that
    would not be given up for it by fairness. larger_s: by how much sooner it could be if the largest of these
    were given up for it, as it is larger. ahead: requests that are due before it.
    guarded: whether fairness demands that it is let in if it can be in time.
    """

    ttft_s: float
    kept_ttft_s: float
    larger_s: float
    guarded: bool
    ahead: int


class GoodputGateQueue:
    """Slack-EDF; in overload, Moore-Hodgson with guards (`fairness.py`)."""

    def __init__(self, readers: Readers) -> None:
        self.readers = readers
        self._fairness = Fairness()
        self._drain = DrainRate()
        self._waiting: dict[str, Waiting] = {}
        self._lines: dict[Place, Line[Waiting]] = {place: Line() for place in Place}
        self._late_by_arrival: Line[Waiting] = Line()
        self._late_credit_s = 0.0
        self._first_late: str | None = None  # whose turn it is
        self._tenants: Counter[str] = Counter()  # of those that are not late
        self._arrivals = 0
        self._offered: dict[str, bool] = {}  # what `next` gave last: whether it was in time
        self._placed_since = False
        self._planned_at = self._asked_at = float("-inf")
        self._wait_s = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def num_late(self) -> int:
        """Requests that wait and can no longer be in time."""
        return len(self._lines[Place.LATE])

    @property
    def late_s(self) -> float:
        """How long readers would take for these."""
        return self._lines[Place.LATE].work_s / self.rate

    @property
    def rate(self) -> float:
        """Reader's time worth of work that is placed per second while something waits."""
        return max(1, len(self.readers)) * self._drain.share

    @property
    def _pace(self) -> float:
        """How much faster than predicted readers are. Those that also write take less for that alone."""
        return self._drain.pace if self.readers.only_read else 1.0

    def add(self, request: Request) -> None:
        self._take_out(request.request_id)
        self._arrivals += 1
        self._waiting[request.request_id] = one = self._of(request, self._arrivals)
        self._tenants[request.tenant] += 1
        self._stand(one, one.place)

    def remove(self, request_id: str) -> None:
        self._take_out(request_id)

    def placed(self, request_id: str) -> None:
        oldest = self._oldest_late()
        one = self._take_out(request_id)
        if one is not None and request_id in self._offered:
            self._placed(one, oldest, in_time=self._offered[request_id])

    def next(self, now: float) -> Iterable[Request]:
        if not self._waiting and not self._offered and not self._placed_since:
            return ()  # as the last time
        # Late ones wait as they are to harm nobody, not because readers are full.
        stuck = any(self._offered.values()) and not self._placed_since
        waiting = len(self._waiting) > self.num_late
        self._drain.look(now, len(self.readers), blocked=stuck, waiting=waiting)
        self._placed_since = False
        if self._plan_is_old(now):
            self._plan(now)
        start = self._start(now)
        chosen = list(islice(self._in_order(start), _CANDIDATES))
        self._offered = {one.request.request_id: start <= one.start_by for one in chosen}
        return [one.request for one in chosen]

    def is_its_turn(self, request_id: str) -> bool:
        """Whether it is late, and was let go first in what `next` gave last."""
        return request_id == self._first_late

    def outlook(self, request: Request, now: float, with_it: int = 0) -> Outlook:
        """with_it: requests like it, of the same call, that go before it."""
        one = self._of(request, self._arrivals + 1)
        kept, given_up = self._lines[Place.KEPT], self._lines[Place.GIVEN_UP]
        first_s = self._lines[Place.RESUMED].work_s + with_it * one.read_s
        read_s = self.readers.ttft_s(request, now) / self._pace
        alone_s = now - request.arrived_at + read_s + first_s / self.rate
        before_s = kept_s = kept.work_before_s(one.by_deadline)
        larger_s = 0.0
        if before_s:
            one.hold = hold_of(one, self._fairness.guards(self._tenants.keys() | {request.tenant}))
            if alone_s + before_s / self.rate > request.slo.limits.ttft_s:
                lower_s, larger_s = _gives_way_s(one, kept.before(one.by_deadline))
                kept_s -= lower_s
        passed_over = [other for other in given_up if other.by_deadline < one.by_deadline]
        passed_over_s = sum(other.read_s for other in passed_over)
        return Outlook(
            ttft_s=alone_s + (before_s + passed_over_s) / self.rate,
            kept_ttft_s=alone_s + kept_s / self.rate,
            larger_s=larger_s / self.rate,
            guarded=one.hold > PLAIN,
            ahead=len(self._lines[Place.RESUMED])
            + with_it
            + kept.count_before(one.by_deadline)
            + len(passed_over),
        )

    def refused(self, request: Request) -> None:
        """The request is not let in, as it would be late: that counts for its bin of lengths."""
        self._fairness.missed(length_bin(len(request.prompt_token_ids)))

    def _of(self, request: Request, number: int) -> Waiting:
        return Waiting.of(request, number, self.readers.read_s(request), self._pace)

    def _start(self, now: float) -> float:
        """When a reader could begin with the next one."""
        if now - self._asked_at >= _PLAN_EVERY_S:
            self._asked_at = now
            first = next(iter(self._lines[Place.KEPT]), None)
            self._wait_s = 0.0 if first is None else self.readers.wait_s(first.request, now)
        return now + self._wait_s

    def _in_order(self, start: float) -> Iterator[Waiting]:
        """start: when reading can begin."""
        self._first_late = None
        yield from self._lines[Place.RESUMED]
        oldest = self._oldest_late() if self._late_credit_s else None
        if oldest is not None and self._late_credit_s >= oldest.read_s:
            self._first_late = oldest.request.request_id
            yield oldest
        else:
            oldest = None
        behind = []  # since the last plan; the next one moves them
        for one in islice(self._lines[Place.KEPT], _LOOKS):
            if start <= one.start_by:
                yield one
            else:
                behind.append(one)
        rest = [
            *behind,
            *islice(self._lines[Place.GIVEN_UP], _CANDIDATES),
            *islice(self._lines[Place.LATE], _CANDIDATES + 1),
        ]
        yield from sorted((one for one in rest if one is not oldest), key=lambda one: one.by_size)

    def _oldest_late(self) -> Waiting | None:
        return next(iter(self._late_by_arrival), None)

    def _plan_is_old(self, now: float) -> bool:
        kept, given_up = len(self._lines[Place.KEPT]), len(self._lines[Place.GIVEN_UP])
        age_s = now - self._planned_at
        too_old = age_s >= max(_PLAN_EVERY_S, (kept + given_up) * _PLAN_EVERY_S_EACH)
        return kept + given_up > 0 and (too_old or (not kept and age_s > 0))

    def _plan(self, now: float) -> None:
        self._planned_at = now
        waiting = sorted(
            chain(self._lines[Place.KEPT], self._lines[Place.GIVEN_UP]), key=lambda one: one.by_deadline
        )
        guards = self._fairness.guards(self._tenants.keys())
        first_s = self._lines[Place.RESUMED].work_s
        plan = make_plan(waiting, guards, self.readers, self.rate, first_s, now)
        for place, members in ((Place.KEPT, plan.kept), (Place.GIVEN_UP, plan.given_up)):
            for one in members:
                one.place = place
            self._lines[place] = Line((one.key, one.read_s, one) for one in members)
        for one in plan.late:
            self._stand(one, Place.LATE)
            self._forget_tenant(one)
            if one.can:
                self._fairness.missed(one.length)

    def _stand(self, one: Waiting, place: Place) -> None:
        one.place = place
        self._lines[place].add(one.key, one.read_s, one)
        if place is Place.LATE:
            self._late_by_arrival.add(one.by_arrival, one.read_s, one)

    def _take_out(self, request_id: str) -> Waiting | None:
        one = self._waiting.pop(request_id, None)
        if one is None:
            return None
        self._lines[one.place].remove(one.key)
        if one.place is Place.LATE:
            self._late_by_arrival.remove(one.by_arrival)
        else:
            self._forget_tenant(one)
        return one

    def _forget_tenant(self, one: Waiting) -> None:
        self._tenants[one.request.tenant] -= 1
        if not self._tenants[one.request.tenant]:
            del self._tenants[one.request.tenant]

    def _placed(self, one: Waiting, oldest: Waiting | None, *, in_time: bool) -> None:
        """One of those offered was taken."""
        self._placed_since = True
        self._drain.placed(one.read_s)
        if one is oldest:
            self._late_credit_s = max(0.0, self._late_credit_s - one.read_s)
        elif oldest is not None and in_time:
            self._late_credit_s = min(oldest.read_s, self._late_credit_s + LATE_SHARE * one.read_s)
        if in_time and one.can and one.place is not Place.RESUMED:
            self._fairness.placed(one.request.tenant, one.length, one.read_s)


def _gives_way_s(one: Waiting, before: list[Waiting]) -> tuple[float, float]:
    """Work that fairness gives up for `one`, all that has a lower hold; and the largest that is held alike,
    if that is larger than it."""
    equals = [other for other in before if other.by_deadline[0] == one.by_deadline[0]]
    lower_s = sum(other.read_s for other in equals if other.hold < one.hold)
    larger = (other.read_s for other in equals if other.hold == one.hold and other.read_s > one.read_s)
    return lower_s, max(larger, default=0.0)
