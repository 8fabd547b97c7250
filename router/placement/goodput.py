"""The placement of the goodput policy: where the request is good and harms nobody.

    pairs, local reading --> in time without harm? --> earliest first token --> starts soon? place it
                                  | no                                              | no
                                  v                                                 v
                   lost: place it where it starts soon, without harm          wait at the gate

A request waits where its placement can still change (late binding): it is placed when its prompt would be
started within STAGE_S, which is enough for a worker never to run dry. Those that wait have their work booked
where they would go, so those behind them in the same round of the gate look elsewhere: together that is list
scheduling by earliest completion, in the order of the gate.

Conditional disaggregation follows from it: a mixed worker reads a prompt itself where it has the first token
no later than any pair, be it for what it has cached or because prefill workers are busy, and the steps of
those who decode there have room for it. If it would be in time there but on no pair, it is deflected. Where
its answer may be so short that the hand-off alone would make its tokens late on the average, it is read there
even if a pair had the first token sooner."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from router.estimates import Estimates
from router.placement.base import Decision, Kind
from router.placement.bookings import Bookings
from router.placement.candidates import Candidates
from router.placement.options import Option, Options
from router.placement.room import can_read, can_write, has_blocks, has_slot, no_pair_ever
from router.pool_view import WRITERS, PoolView, Role, WorkerView
from router.prefix_index import PrefixIndex
from router.requests import Request

STAGE_S = 0.1
MOST_RETRY_S = 0.1
RETRY_SHARE = 0.01
"""Of a TTFT limit: how soon those are looked at again who would have harmed somebody."""
EXPLORE = 0.01
_JITTER = 0.02
_MOST_PAIRS = 64


@dataclass(slots=True)
class _Search:
    """slack_s: by when the first token has to come, from now on. avoid: workers that are left out.
    heeds_harm: whether those that are there are spared. Found on the way: has_any, whether there is a worker
    with room; is_possible, whether the first token could come in time but for the harm."""

    request: Request
    options: Options
    slack_s: float
    avoid: Collection[str]
    heeds_harm: bool = True
    has_any: bool = False
    is_possible: bool = False

    def may_read(self, worker: WorkerView) -> bool:
        """Whether a prefill worker comes into question."""
        return not worker.refused and can_read(worker, self.request) and worker.worker_id not in self.avoid

    def may_write(self, worker: WorkerView) -> bool:
        """Whether a decode or mixed worker has room."""
        request = self.request
        return (
            worker.worker_id not in self.avoid and can_write(worker, request) and has_blocks(worker, request)
        )

    def is_good(self, option: Option) -> bool:
        if option.ttft_s > self.slack_s:
            return False
        self.is_possible = True
        return not (option.does_harm and self.heeds_harm)


class GoodputPlacement:
    """Equals are told apart at random, and now and then it is not the best that is taken: so routers side by
    side do not run after one another, and no worker's speed goes unlearned."""

    def __init__(
        self,
        pool: PoolView,
        estimates: Estimates,
        prefixes: PrefixIndex,
        rng: random.Random,
        is_its_turn: Callable[[str], bool],
    ) -> None:
        """is_its_turn: whether the gate has let a request go first although it is late."""
        self._pool = pool
        self._estimates = estimates
        self._rng = rng
        self._is_its_turn = is_its_turn
        self._bookings = Bookings()
        self.retry_s = 0.0
        """See `Policy`; of the last round."""
        self._prefills = Candidates(pool, prefixes, rng, (Role.PREFILL,), _unread_tokens)
        self._writers = Candidates(pool, prefixes, rng, WRITERS, _batch_size)
        self._mixed = Candidates(pool, prefixes, rng, (Role.MIXED,), _unread_and_batch)

    def choose(self, request: Request, avoid: Collection[str], now: float) -> Decision | None:
        if self._bookings.look(request.request_id, now):
            self.retry_s = MOST_RETRY_S
        decision, has_any = self._choose(request, avoid, now)
        if avoid and not has_any:
            decision, _ = self._choose(request, (), now)
        return decision

    def _choose(self, request: Request, avoid: Collection[str], now: float) -> tuple[Decision | None, bool]:
        """The decision, and whether there was any worker to decide about."""
        options = Options(self._estimates, request, now)
        slack_s = request.arrived_at + request.slo.limits.ttft_s - now
        search = _Search(request, options, math.inf if request.answered else slack_s, avoid)
        best = self._best(search)
        if best is None and request.answered:  # a reader waits in the middle of an answer: whatever it costs
            search.heeds_harm = False
            best = self._best(search)
        if best is not None or search.is_possible:
            if best is None:
                self._retry_in(RETRY_SHARE * request.slo.limits.ttft_s)
            return self._place_or_book(request, best), True
        leaves_room = not self._is_its_turn(request.request_id)
        lost = Options(self._estimates, request, now, is_lost=True, leaves_room=leaves_room)
        search = _Search(request, lost, math.inf, avoid)
        best = self._best(search)
        if best is not None and not _starts_soon(best):
            self._retry_in(best.wait_s - STAGE_S)
            best = None
        return self._place_or_book(request, best), search.has_any

    def _place_or_book(self, request: Request, best: Option | None) -> Decision | None:
        if best is None:
            return None
        if not _starts_soon(best):
            self._retry_in(best.wait_s - STAGE_S)
            self._bookings.book(request.request_id, best.reader.worker_id, best.ttft_s - best.wait_s)
            return None
        (self._mixed if best.prefill is None else self._prefills).remember(best.reader.worker_id)
        self._writers.remember(best.writer.worker_id)
        return best.decision()

    def _retry_in(self, seconds: float) -> None:
        self.retry_s = max(0.0, min(self.retry_s, seconds))

    def _best(self, search: _Search) -> Option | None:
        """The good option with the earliest first token."""
        explores = self._rng.random() < EXPLORE
        readers = self._prefills.look(search.request, search.may_read)
        pair = self._best_pair(search, readers, explores) if readers else None
        mixed = self._mixed.look(search.request, search.may_write)
        local = self._best_local(search, mixed, explores, has_readers=bool(readers)) if mixed else None
        if local is None:
            return pair
        # Those that explore go by pairs, too, or it would never be learned that hand-offs have become faster.
        if pair is not None and (pair.keeps_tpot or explores) and pair.ttft_s < local.ttft_s:
            return pair
        return replace(local, kind=Kind.DEFLECTED) if readers and pair is None else local

    def _best_pair(self, search: _Search, readers: Sequence[WorkerView], explores: bool) -> Option | None:
        """Of the first prefill worker, by the time of the first token, that has good writers: the one of
        these with the shortest time per token, the hand-off spread over the answer. So where steps are alike
        a near writer goes before one behind a slower link."""
        writers = self._writers.look(search.request, search.may_write)
        if not writers:
            return None
        search.has_any = True
        looks = []
        for reader in readers:
            read, booked_s = search.options.read(reader), self._bookings.booked_s(reader.worker_id)
            ttft_s = booked_s + read.ttft_s
            if ttft_s <= search.slack_s:
                search.is_possible = True
                if read.compute_s <= read.spare_s or not search.heeds_harm:
                    key = self._key(ttft_s, reader.outstanding_tokens, explores)
                    looks.append((key, booked_s, read, reader))
        looks.sort(key=lambda look: look[0])
        for _, booked_s, read, reader in looks[: max(1, _MOST_PAIRS // len(writers))]:
            linked = self._pool.pairs.linked_with(reader.worker_id)
            pairs = (
                search.options.pair(reader, read, booked_s, one) for one in writers if one.worker_id in linked
            )
            good = [pair for pair in pairs if search.is_good(pair)]
            if good:
                return min(good, key=lambda pair: self._key(pair.tpot_s, pair.writer.requests, explores))
        return None

    def _best_local(
        self, search: _Search, mixed: Sequence[WorkerView], explores: bool, *, has_readers: bool
    ) -> Option | None:
        """Of the mixed workers the one with the earliest first token. If it is not known how long the steps
        of one take, it reads only what no pair could."""
        if not all(one.latency.model.is_known for one in mixed) and not no_pair_ever(
            self._pool, search.request
        ):
            mixed = [one for one in mixed if one.latency.model.is_known]
        search.has_any = search.has_any or bool(mixed)
        options = (
            search.options.local(
                one, self._bookings.booked_s(one.worker_id), could_be_handed_over=has_readers
            )
            for one in mixed
        )
        good = [option for option in options if search.is_good(option)]
        return min(
            good,
            key=lambda option: self._key(option.ttft_s, option.writer.outstanding_tokens, explores),
            default=None,
        )

    def _key(self, seconds: float, load: int, explores: bool) -> tuple[float, int, float]:
        """What to sort by."""
        chance = self._rng.random()
        return (chance, 0, 0.0) if explores else (seconds * (1 + _JITTER * chance), load, chance)


def _starts_soon(option: Option) -> bool:
    reader = option.reader
    return option.wait_s <= STAGE_S if reader.latency.model.is_known else has_slot(reader)


def _unread_tokens(worker: WorkerView) -> int:
    return worker.outstanding_tokens


def _batch_size(worker: WorkerView) -> int:
    return worker.requests


def _unread_and_batch(worker: WorkerView) -> int:
    return worker.outstanding_tokens + worker.requests
