"""Random schedules of a simulated cluster: one router, a prefill and a decode worker with their successors.

What goes wrong (`faults`): workers crash or are taken for dead and go on later as strangers to the router,
freeze, lose links with and without a word; the router says things twice, gives a pair up, or is restarted.
What may happen to anybody: requests are cancelled at any time, steps take several leases, blocks run out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

from engine.sequence import RequestKey
from tests.transfer.simulated_workers import DecodeWorker, PrefillWorker, Request
from tests.transfer.simulation import BLOCK_SIZE, LEASE_S, Link, Timeline, Worker
from transfer.handoff import Peer

END_S = 100.0
MAX_ATTEMPTS = 3


class Schedule:
    """outcomes: of each attempt. failures: what workers told the router unasked."""

    def __init__(self, seed: int, faults: float, cancels: float) -> None:
        self.time = Timeline(seed, faults)
        self.random = self.time.random
        self.cancels = cancels
        self.outcomes: dict[RequestKey, str] = {}
        self.failures: list[tuple[RequestKey, str]] = []
        self.requests: dict[RequestKey, Request] = {}
        self._num_links = 0
        self._unattached: set[Worker] = set()
        self.digest_share = self.random.choice([0.0, 0.5, 1.0])
        self.prefill = PrefillWorker(self.time, 1, self, self.time.chance(faults / 20))
        self.decode = DecodeWorker(self.time, 1, self)
        self.workers: list[Worker] = [self.prefill, self.decode]

    def run(self) -> Schedule:
        time, uniform = self.time, self.random.uniform
        time.after(uniform(0, 3), self._pair)
        for i in range(self.random.randint(1, 7)):
            time.after(uniform(0, 6), self._place, RequestKey(f"r{i}", 0))
        for _ in range(3):
            time.after(uniform(0, 15), self._noise, "prefill")
            time.after(uniform(0, 15), self._noise, "decode")
            time.after(uniform(0, 15), self._long_step)
        kinds = (self._crash, self._crash, self._break_link, self._break_link, self._freeze)
        for fault in (*kinds, self._restart_router, self._give_up_pair):
            if time.chance(time.faults):
                time.after(uniform(0, 12), fault)
        time.at(END_S, self._retire)
        time.run()
        for worker in self.workers:
            if worker.alive:
                worker.check_rest()
        return self

    # --- what workers ask and tell

    def prefill_at(self, peer: Peer) -> PrefillWorker | None:
        return next((w for w in self.workers if isinstance(w, PrefillWorker) and w.peer == peer), None)

    def next_link(self) -> int:
        self._num_links += 1
        return self._num_links

    def failed(self, request: Request, worker: Worker, why: str) -> None:
        self.time.after(self.time.delay(), self._failed, request, why)

    def reserved(self, request: Request) -> None:
        if request.key not in self.outcomes:
            self._command(request.prefill, request.prefill.prefill, request)
            if self._doubles(request):
                self._command(request.prefill, request.prefill.prefill, request)

    def ended(self, request: Request, outcome: str) -> None:
        self.outcomes.setdefault(request.key, outcome)
        if outcome not in ("delivered", "no blocks"):
            self._cancel(request.key, outcome)

    # --- requests

    def _place(self, key: RequestKey) -> None:
        num_tokens = self.random.randint(1, 10)
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        # The beginnings of prompts are often the same.
        shared = (f"group {self.random.randint(0, 2)}", self.random.choice([0, 0, 1, 2, 4]))
        tags = [(shared[0] if i < shared[1] else key, i) for i in range(num_blocks)]
        is_sampled = self.time.chance(self.digest_share)
        request = Request(key, num_tokens, tags, self.prefill, self.decode, is_sampled)
        self.requests[key] = request
        self._command(self.decode, self.decode.post, self.decode.reserve, request)
        if self._doubles(request):
            self._command(self.decode, self.decode.post, self.decode.reserve, request)
        if self.time.chance(self.cancels):
            self.time.after(self.random.uniform(0, 6), self._cancel, key, "cancelled")

    def _doubles(self, request: Request) -> bool:
        if not request.is_doubled and self.time.chance(self.time.faults / 10):
            request.is_doubled = True
            return True
        return False

    def _cancel(self, key: RequestKey, outcome: str) -> None:
        """At both workers, at each when it pleases the network; also twice, and where it is not known."""
        self.outcomes.setdefault(key, outcome)
        request, wait_s = self.requests[key], self.random.choice([0.0, 0.0, 1.0, 3.0])
        for worker in (request.prefill, request.decode):
            self._command(worker, worker.post, worker.cancel, key)
            self.time.after(wait_s, self._command, worker, worker.post, worker.cancel, key)

    def _failed(self, request: Request, why: str) -> None:
        key = request.key
        outcome = self.outcomes.get(key)
        self.failures.append((key, why))
        assert outcome != "delivered" or request.is_doubled, f"{key} failed after it was delivered"
        if outcome is None:
            self.outcomes[key] = why
            self._place_again(key)

    def _place_again(self, key: RequestKey) -> None:
        self.time.after(self.time.delay(), self._cancel, key, self.outcomes[key])
        if key.attempt + 1 < MAX_ATTEMPTS:
            self.time.after(self.time.delay(), self._place, RequestKey(key.request_id, key.attempt + 1))

    # --- workers

    def _command(self, worker: Worker, do: Callable[..., None], *args: object) -> None:
        if worker not in self._unattached:
            worker.command(do, *args)

    def _pair(self) -> None:
        decode, peer = self.decode, self.prefill.peer
        for _ in range(2 if self.time.chance(self.time.faults / 5) else 1):
            self._command(decode, decode.post, decode.pair, peer)

    def _detach(self, worker: Worker) -> None:
        """The router's stream to this life ends; what waits for it is placed again."""
        self._command(worker, worker.post, worker.router_gone)
        self._unattached.add(worker)
        for key, request in self.requests.items():
            if key not in self.outcomes and worker in (request.prefill, request.decode):
                self.outcomes[key] = "down"
                self._place_again(key)

    def _retire(self) -> None:
        """All has come to rest long ago, but that workers stay linked."""
        undecided = self.requests.keys() - self.outcomes.keys()
        assert not undecided, f"stuck: {undecided}"
        for worker in self.workers:
            if worker.alive:
                assert worker.pool.counts().leased == 0, f"{worker.peer} keeps blocks"
            if isinstance(worker, DecodeWorker) and worker.alive:
                for peer in worker.pairs:
                    prefill = self.prefill_at(peer)
                    assert prefill is not None
                    linked = worker.pulls._dialling.link_of(peer) is not None
                    assert linked or prefill.does_not_fit, f"{worker.peer} does not dial {peer} any more"
                # Also those to whom only a request wanted to be linked: such a link stays until it is lost.
                for peer in list(worker.pulls._dialling._peers):
                    linked = worker.pulls._dialling.link_of(peer) is not None
                    assert linked or peer in worker.pairs, f"{worker.peer} dials {peer} for nobody"
                    worker.arrive(worker.post, worker.unpair, peer)

    # --- what happens

    def _noise(self, name: str) -> None:
        (self.prefill if name == "prefill" else self.decode).noise()

    def _either(self) -> Worker:
        return self.random.choice([self.prefill, self.decode])

    def _long_step(self) -> None:
        """Not a fault: a model and a machine may be like that."""
        worker = self._either()
        worker.in_step_until = self.time.now + self.random.choice([0.5, 1.5, 3.0]) * LEASE_S
        self.time.moves_until(worker.in_step_until)

    def _freeze(self) -> None:
        self._freeze_for(self._either(), self.random.choice([1.0, 2.0 * LEASE_S]))

    def _freeze_for(self, worker: Worker, freeze_s: float) -> None:
        worker.frozen_until = max(worker.frozen_until, self.time.now + freeze_s)
        self.time.moves_until(worker.frozen_until)
        for link in worker.links.values():
            if link.carries and freeze_s > LEASE_S and self.time.chance(0.7):
                self._silence(link)

    def _break_link(self) -> None:
        carrying = [link for link in self.prefill.links.values() if link.carries]
        if carrying:
            link = self.random.choice(carrying)
            if self.time.chance(0.3):
                self._silence(link)
            else:
                link.lose(self.time.delay, swallows=self.time.chance(0.5))

    def _silence(self, link: Link) -> None:
        """Nothing gets through, and nothing says so: each end finds out for itself."""
        notice_s = partial(self.random.uniform, 0.8 * LEASE_S, 1.2 * LEASE_S)
        link.lose(notice_s, swallows=True)

    def _crash(self) -> None:
        old = self._either()
        epoch = old.peer.epoch + 1
        new: Worker
        if isinstance(old, PrefillWorker):
            new = self.prefill = PrefillWorker(
                self.time, epoch, self, self.time.chance(self.time.faults / 20)
            )
        else:
            new = self.decode = DecodeWorker(self.time, epoch, self)
        self.workers.append(new)
        if self.time.chance(0.3):
            # It is not dead; only nobody hears of it for a while.
            self._freeze_for(old, self.random.uniform(1, 3) * LEASE_S)
        else:
            old.alive = False
            for link in old.links.values():
                link.lose(self.time.delay, swallows=self.time.chance(0.5))
        self.time.after(self.time.delay(), self._detach, old)
        if new is self.prefill:
            self.time.after(self.time.delay(), self._replace_pair, old.peer)
        else:
            self.time.after(self.time.delay(), self._pair)

    def _replace_pair(self, old: Peer) -> None:
        self._command(self.decode, self.decode.post, self.decode.unpair, old)
        self._pair()

    def _give_up_pair(self) -> None:
        """The router takes the prefill worker for dead, and finds that it lives."""
        decode, peer = self.decode, self.prefill.peer
        self._command(decode, decode.post, decode.unpair, peer)
        self.time.after(self.random.uniform(0, 2), self._pair)

    def _restart_router(self) -> None:
        for worker in (self.prefill, self.decode):
            self._detach(worker)
            self._unattached.discard(worker)
        self.time.after(self.time.delay(), self._pair)


def run_range(
    start: int, stop: int, faults: float, cancels: float
) -> tuple[Counter[str], set[tuple[str, str]]]:
    """Outcomes and seen pairs of many schedules. An error names the schedule's seed."""
    outcomes: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    for seed in range(start, stop):
        schedule = Schedule(seed, faults, cancels)
        try:
            schedule.run()
        except Exception as error:
            what = f"Schedule({seed}, {faults}, {cancels}) at {schedule.time.now:.3f} s"
            raise AssertionError(f"{what}: {error!r}") from error
        outcomes.update(schedule.outcomes.values())
        seen |= schedule.time.seen
    return outcomes, seen
