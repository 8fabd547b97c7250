"""The gate of the goodput policy: who can be in time goes first, earliest deadline first.

A request stands in one of four lines:

    resumed    part of its answer is out: its reader waits, so it goes before all others, as it arrived
    kept       all of these can be in time: by priority, then earliest deadline first (slack-EDF)
    given up   could be in time, but not with all the others: chosen by Moore-Hodgson, as fairness allows
    late       can no longer be in time

Those given up and the late ones go when nobody who is kept can, by priority, then shortest first. Who is kept
is planned anew every few milliseconds; until then, whoever comes counts as kept.

What late ones are guaranteed: the one that has waited longest goes before those in time each time that
`1 / LATE_SHARE` times its own work has been placed. So each goes in the end, after no more than that for all
that came before it, and late ones take no more than `LATE_SHARE` of what readers do in overload.

A request that could not be in time if nothing else were there has no deadline to keep, and yet does not wait
like one that is late: it is planned for to be served soon, and the first to be given up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

from router.gate.drain import DrainRate
from router.gate.fairness import Fairness
from router.gate.line import Line
from router.gate.plan import make_plan
from router.gate.readers import Readers
from router.gate.waiting import Place, Waiting
from router.requests import Request

LATE_SHARE = 0.05
_CANDIDATES = 4
_LOOKS = 16
_PLAN_EVERY_S = 0.005
_PLAN_EVERY_S_EACH = 20e-6  # a plan costs a microsecond or two for each that waits


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a request could expect at the gate. ttft_s: its time to first token if all that are due before it
    go before it. kept: whether it would be in time, if need be with others given up for it. ahead: requests
    that are due before it."""

    ttft_s: float
    kept: bool
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
        self._tenants: Counter[str] = Counter()  # of those that are not late
        self._arrivals = 0
        self._offered: dict[str, bool] = {}  # what `next` gave last: whether it was in time
        self._placed_since = False
        self._planned_at = float("-inf")

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

    def add(self, request: Request) -> None:
        self._take_out(request.request_id)
        self._arrivals += 1
        self._waiting[request.request_id] = one = self._of(request)
        self._tenants[request.tenant] += 1
        self._stand(one, one.place)

    def remove(self, request_id: str) -> None:
        oldest = self._oldest_late()
        one = self._take_out(request_id)
        if one is not None and request_id in self._offered:
            self._placed(one, oldest, in_time=self._offered[request_id])

    def next(self, now: float) -> Iterable[Request]:
        stuck = bool(self._offered) and not self._placed_since
        self._drain.look(now, len(self.readers), blocked=stuck, waiting=bool(self._waiting))
        self._placed_since = False
        if self._plan_is_old(now):
            self._plan(now)
        chosen = list(islice(self._in_order(now), _CANDIDATES))
        self._offered = {one.request.request_id: now <= one.start_by for one in chosen}
        return [one.request for one in chosen]

    def outlook(self, request: Request, now: float, with_it: int = 0) -> Outlook:
        """with_it: requests like it, of the same call, that go before it."""
        one = self._of(request)
        kept, given_up = self._lines[Place.KEPT], self._lines[Place.GIVEN_UP]
        first_s = self._lines[Place.RESUMED].work_s + with_it * one.read_s
        alone_s = now - request.arrived_at + self.readers.ttft_s(request, now) + first_s / self.rate
        before_s, limit_s = kept.work_before_s(one.by_deadline), request.slo.limits.ttft_s
        least_s = alone_s + before_s / self.rate
        if before_s and alone_s <= limit_s < least_s:
            guards = self._fairness.guards(len(self._tenants.keys() | {request.tenant}))
            guarded = guards.guards(request.tenant, one.length, one.read_s)
            least_s -= _gives_way_s(one, guarded, kept.before(one.by_deadline)) / self.rate
        passed_over = [other for other in given_up if other.by_deadline < one.by_deadline]
        return Outlook(
            ttft_s=alone_s + (before_s + sum(other.read_s for other in passed_over)) / self.rate,
            kept=least_s <= limit_s,
            ahead=len(self._lines[Place.RESUMED]) + len(kept.before(one.by_deadline)) + len(passed_over),
        )

    def refused(self, request: Request) -> None:
        """The request is not let in, as it would be late: that counts for its bin of lengths."""
        self._fairness.missed(self._of(request).length)

    def _of(self, request: Request) -> Waiting:
        return Waiting.of(request, self._arrivals, self.readers.read_s(request))

    def _in_order(self, now: float) -> Iterator[Waiting]:
        yield from self._lines[Place.RESUMED]
        oldest = self._oldest_late() if self._late_credit_s else None
        if oldest is not None and self._late_credit_s >= oldest.read_s:
            yield oldest
        else:
            oldest = None
        # Who has fallen behind since the last plan is moved by the next one.
        yield from (one for one in islice(self._lines[Place.KEPT], _LOOKS) if now <= one.start_by)
        rest = [
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
        guards = self._fairness.guards(len(self._tenants))
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


def _gives_way_s(one: Waiting, guarded: bool, before: list[Waiting]) -> float:
    """Work that would be given up for `one`: the largest that is larger than it, or, where it is guarded, all
    that is not."""
    loose = [
        other.read_s
        for other in before
        if not other.guarded and other.request.slo.priority == one.request.slo.priority
    ]
    if guarded:
        return sum(loose)
    return max((read_s for read_s in loose if read_s > one.read_s), default=0.0)
