"""The router in virtual time: production's policy, pool view, estimates and recovery; messages that only take
time. What router/dispatch.py, router/live_requests.py and router/pump.py do in an event loop.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cluster.simulator.clock import Clock
from cluster.simulator.cluster_spec import ClusterSpec
from cluster.simulator.heard_ledger import HeardLedger
from cluster.simulator.live import Live, Placed, SimulatedReader, SimulatedWorker, SimulatedWriter
from cluster.simulator.steps import Run
from cluster.workload.jobs import Row, Status
from engine.latency import StepShape
from engine.sequence import RequestKey
from engine.urgency import Urgency as WorkerUrgency
from router.admission.base import Refusal
from router.estimates import Estimates
from router.lengths import OutputLengths
from router.pair_table import LinkState, Pair, PairLink
from router.placement.base import Decision
from router.policies import POLICIES, PolicyInputs
from router.pool_view import WRITERS, Load, PoolView, Role, WorkerView
from router.prefix_index import PrefixIndex
from router.recovery import Recovery, RetryBudget, Verdict, pause_s, worker_lost
from router.requests import Request, Stage
from router.stages import StageClock
from router.urgency import urgency

_RETRY_SHARE, _RETRY_BURST = 1.0, 256
_LINKED = PairLink(LinkState.LINKED)


class Token(NamedTuple):
    """Of a step of a writer. read: with the first one of a prompt that was read there, how long it waited and
    was read; decode_queue_s, transfer_s: with the first one after a hand-off."""

    live: Live
    key: RequestKey
    is_last: bool
    read: tuple[float, float] | None
    decode_queue_s: float | None
    transfer_s: float


class Router:
    """on_row: told of each request that has ended, with its number."""

    def __init__(
        self, cluster: ClusterSpec, clock: Clock, seed: int, on_row: Callable[[int, Row], None]
    ) -> None:
        self._cluster = cluster
        self._clock = clock
        self._on_row = on_row
        self._message_s = cluster.network.message_s
        self.pool = PoolView()
        self._prefixes = PrefixIndex(self.pool)
        self._lengths = OutputLengths()
        self._estimates = Estimates(self.pool, self._prefixes, self._lengths)
        inputs = PolicyInputs(
            self.pool,
            self._prefixes,
            self._estimates,
            random.Random(seed),
            cluster.max_gated_requests,
            cluster.retry_after_s,
        )
        policy = POLICIES[cluster.policy](inputs)
        self._admission, self._gate, self._placement = policy.admission, policy.gate, policy.placement
        self._tells_urgency, self._retry_s = policy.tells_urgency, policy.retry_s
        self._recovery = Recovery(cluster.max_attempts, RetryBudget(_RETRY_SHARE, _RETRY_BURST))
        self._readers: dict[str, SimulatedReader] = {}
        self._writers: dict[str, SimulatedWriter] = {}
        self._commands: Counter[str] = Counter()
        self._runs: dict[str, deque[Run]] = {}
        self._live: dict[str, Live] = {}
        # When those that have come are given up, the next first; some have ended.
        self._deadlines: deque[tuple[float, str]] = deque()
        self._round_at: float | None = None
        self.placements: Counter[str] = Counter()
        self.num_refused_in_vain = 0

    def after_message(self, what: Callable[[], None]) -> None:
        """A message from a worker, sent now."""
        self._clock.at(self._clock.now + self._message_s, what)

    # What happens to workers.

    def reader_up(self, worker: SimulatedReader, view: WorkerView) -> None:
        """A prefill worker, or a new life of it."""
        self._readers[worker.worker_id] = worker
        self._up(view)

    def writer_up(self, worker: SimulatedWriter, view: WorkerView) -> None:
        """A decode or mixed worker, or a new life of it."""
        self._writers[worker.worker_id] = worker
        self._runs[worker.worker_id] = deque()
        view.writing = HeardLedger(lambda: self._hear(worker.worker_id))
        self._up(view)

    def worker_down(self, worker_id: str) -> None:
        """Its requests are placed again."""
        writes = worker_id in self._writers
        if writes:
            self._hear(worker_id)
            self._runs[worker_id].clear()
        self.pool.down(worker_id)
        self._prefixes.forget(worker_id)
        lost: SimulatedWorker = self._writers.pop(worker_id) if writes else self._readers.pop(worker_id)
        for live in list(self._live.values()):
            if live.needs(lost):
                self._recover(live, worker_id)
            elif live.reader is lost:
                live.reader = None  # it has done its part
        self._pump_soon()

    def drain(self, worker_id: str) -> int:
        """It gets nothing new. How many requests need it."""
        view = self.pool[worker_id]
        if not view.draining:
            view.draining = True
            self._pump_soon()
        worker = self._writers.get(worker_id) or self._readers[worker_id]
        return sum(live.needs(worker) for live in self._live.values())

    def change_role(self, worker_id: str, role: Role) -> None:
        """Of a writer."""
        self.pool.change_role(worker_id, role)
        self._pump_soon()

    def _up(self, view: WorkerView) -> None:
        self.pool.add(view)
        self._commands[view.worker_id] = 0
        worker_id = view.worker_id
        if view.role is Role.PREFILL:
            pairs = [Pair(worker_id, writer.worker_id) for writer in self.pool.up(*WRITERS)]
        else:
            pairs = [Pair(reader.worker_id, worker_id) for reader in self.pool.up(Role.PREFILL)]
        for pair in pairs:
            self.pool.pairs.put(pair, _LINKED)
        self._pump_soon()

    # What clients do.

    def arrive(self, number: int, request: Request) -> None:
        live = Live(number, request, StageClock(request.arrived_at))
        now = self._clock.now
        verdict = self._admission.judge(request, now, 0, overdue=False)
        if isinstance(verdict, Refusal):
            self._on_row(number, live.row(Status.REJECTED, None, str(verdict.error)))
            return
        live.request = verdict
        self._live[request.request_id] = live
        self._recovery.budget.admitted()
        self._deadlines.append((now + self._cluster.timeout_s, request.request_id))
        if len(self._deadlines) == 1:
            self._clock.at(self._deadlines[0][0], self._give_up)
        self._gate.add(verdict)
        self._round()

    def _give_up(self) -> None:
        """Those whose time is over. What has ended is forgotten as soon as it comes to the front."""
        deadlines, now = self._deadlines, self._clock.now
        while deadlines and (deadlines[0][0] <= now or deadlines[0][1] not in self._live):
            _, request_id = deadlines.popleft()
            live = self._live.get(request_id)
            if live is not None:
                self._close(live, Status.TIMED_OUT, None, f"given up after {self._cluster.timeout_s:g} s")
        if deadlines:
            self._clock.at(deadlines[0][0], self._give_up)

    # What workers say.

    def runs(self, worker_id: str, run: Run) -> None:
        """The worker begins a run of steps, of each of which the router hears as it ends."""
        self._runs[worker_id].append(run)

    def snapshot(self, worker_id: str, load: Load, steps: Sequence[tuple[StepShape, float]]) -> None:
        view = self.pool[worker_id]
        if not view.up:
            return
        view.snapshot(load, self._clock.now)
        for shape, seconds in steps:
            view.observe(shape, seconds)
        self._pump_soon()

    def blocks(self, worker_id: str, stored: Sequence[int], removed: Sequence[int]) -> None:
        self._prefixes.removed(worker_id, removed)
        self._prefixes.stored(worker_id, stored)

    def reserved(self, live: Live, key: RequestKey, cached_tokens: int) -> None:
        if live.key != key or live.reader is None or live.writer is None:
            return
        now, reader = self._clock.now, live.reader
        live.is_reading = True
        live.travelling_tokens = max(0, live.request.num_tokens - cached_tokens)
        live.stages.reserved(now)
        placed = Placed(live, key, live.request, self._urgency(live), cached_tokens)
        writer = live.writer
        self._send(reader, key, lambda: reader.read(placed, writer))

    def no_room(self, live: Live, key: RequestKey) -> None:
        if live.key == key and live.writer is not None:
            self.pool[live.writer.worker_id].refuse()
            self._to_gate(live)

    def first_token(self, live: Live, key: RequestKey, times: tuple[float, float], *, is_last: bool) -> None:
        """From a prefill worker. times: how long the prompt waited there, and was read."""
        if live.key != key or live.reader is None or live.writer is None:
            return
        self.pool[live.reader.worker_id].release(key)
        self._pump_soon()
        self._read(live, times)
        self._emitted(live, live.writer.worker_id)
        if is_last:
            self._complete(live)

    def tokens(self, worker_id: str, tokens: Sequence[Token], *, are_counted: bool) -> None:
        """Of one step of a writer. are_counted: of a run, of whose steps it hears anyway."""
        self._hear(worker_id)
        for token in tokens:
            live = token.live
            if live.key is not token.key or live.writer is None:
                continue  # it has ended, or is placed again
            if token.read is not None:
                self._read(live, token.read)
            elif token.decode_queue_s is not None:
                self._handed_over(live, token)
            if not are_counted:
                self._emitted(live, worker_id)
            if token.is_last:
                self._forget_workers(live)  # who ends an answer has let go of it
                self._complete(live)

    def _hear(self, worker_id: str) -> None:
        """What has come of runs by now."""
        now, ledger = self._clock.now, self.pool[worker_id].writing
        assert isinstance(ledger, HeardLedger)
        runs = self._runs[worker_id]
        for run in runs:
            count = run.hear(now, self._message_s)
            for live, key in run.writes if count else ():
                if live.key is key and live.writer is not None:
                    live.num_emitted += count
                    ledger.heard(key, count)
        while runs and runs[0].end + self._message_s <= now:
            runs.popleft()

    def _read(self, live: Live, times: tuple[float, float]) -> None:
        live.stages.report(Stage.PREFILL_QUEUE, times[0])
        live.stages.report(Stage.PREFILL, times[1])

    def _handed_over(self, live: Live, token: Token) -> None:
        live.is_handed_over = True
        if live.decision is not None and live.decision.prefill is not None:
            pair = Pair(live.decision.prefill, live.decision.decode)
            self._estimates.transfers.observe(pair, live.travelling_tokens, token.transfer_s)
            if live.decision.expected is not None and live.first_at is not None:
                step_s = live.decision.expected.tpot_s
                gap_s = self._clock.now - live.first_at - step_s
                self._estimates.transfers.observe_second_token(gap_s, step_s)
        live.stages.report(Stage.TRANSFER, token.transfer_s)
        live.stages.report(Stage.DECODE_QUEUE, token.decode_queue_s or 0.0)

    def _emitted(self, live: Live, writer_id: str) -> None:
        now = self._clock.now
        live.num_emitted += 1
        if live.first_at is None:
            live.first_at = now
        live.stages.tokens(now)
        self.pool[writer_id].emitted(live.key, 1)

    def _complete(self, live: Live) -> None:
        self._lengths.observe(live.request, live.num_emitted)
        self._close(live, Status.COMPLETE, self._clock.now)

    # What the router does.

    def _round(self) -> None:
        now = self._clock.now
        self._round_at = None
        while self._place_next(now):
            pass
        self.num_refused_in_vain += self._admission.could_have_served(now)
        if len(self._gate):
            self._round_by(now + max(self._cluster.retry_s, self._retry_s()))

    def _pump_soon(self) -> None:
        if self._live:
            self._round_by(self._clock.now)

    def _round_by(self, when: float) -> None:
        if self._round_at is None or when < self._round_at:
            self._round_at = when
            self._clock.at(when, lambda: self._round_if(when))

    def _round_if(self, when: float) -> None:
        if self._round_at == when:
            self._round()

    def _place_next(self, now: float) -> bool:
        for request in self._gate.next(now):
            live = self._live[request.request_id]
            decision = self._placement.choose(request, (), now)
            if decision is not None:
                self._place(live, decision, now)
                return True
        return False

    def _place(self, live: Live, decision: Decision, now: float) -> None:
        self._gate.placed(live.request.request_id)
        live.place(decision)
        key, writer = live.key, self._writers[decision.decode]
        live.reader = None if decision.prefill is None else self._readers[decision.prefill]
        live.writer = writer
        live.stages.placed(now)
        self.placements[decision.kind.value] += 1
        self._estimates.credit(key, live.request, decision, now)
        placed, is_local = Placed(live, key, live.request, self._urgency(live)), decision.prefill is None
        self._send(writer, key, lambda: writer.reserve(placed, is_local=is_local))

    def _send(self, worker: SimulatedWorker, key: RequestKey, what: Callable[[], None]) -> None:
        number = self._count(worker)
        self.pool[worker.worker_id].sent(key, number)
        self._clock.at(self._clock.now + self._message_s, lambda: worker.command(number, what))

    def _count(self, worker: SimulatedWorker) -> int:
        self._commands[worker.worker_id] += 1
        return self._commands[worker.worker_id]

    def _urgency(self, live: Live) -> WorkerUrgency | None:
        """As the worker will have it, whose clock is the same."""
        if not self._tells_urgency:
            return None
        _, to_come, _ = self._lengths.quantiles(live.request)
        now = self._clock.now
        told = urgency(live.request, now, live.first_at, to_come)
        left_s = told.ttft_left_s
        deadline = None if left_s is None else now + self._message_s + left_s
        return WorkerUrgency(deadline, told.tpot_s, told.priority)

    def _recover(self, live: Live, worker_id: str) -> None:
        """Its placement is lost with that worker."""
        loss = worker_lost(worker_id, "it died")
        live.lost_attempts += 1
        verdict = self._recovery.judge(loss, live.lost_attempts)
        if verdict is not Verdict.PLACE_AGAIN:
            self._close(live, Status.FAILED, None, str(verdict))
            return
        self._to_gate(live, pause_s(loss, live.lost_attempts))

    def _to_gate(self, live: Live, after_s: float = 0.0) -> None:
        self._leave_workers(live)
        live.stages.lost(self._clock.now)
        live.going_on()
        request = live.request

        def again() -> None:
            if self._live.get(request.request_id) is live:
                self._gate.add(request)
                self._pump_soon()

        self._clock.at(self._clock.now + after_s, again)

    def _leave_workers(self, live: Live) -> None:
        """Whoever may still hold something of it is told to forget it."""
        if live.writer is not None:
            self._cancel(live.writer, live.key)
        if live.reader is not None and live.is_reading:
            self._cancel(live.reader, live.key)
        self._forget_workers(live)

    def _cancel(self, worker: SimulatedWorker, key: RequestKey) -> None:
        number = self._count(worker)
        self._clock.at(
            self._clock.now + self._message_s, lambda: worker.command(number, lambda: worker.cancel(key))
        )

    def _forget_workers(self, live: Live) -> None:
        """Nothing of it is there any more, or will be in a moment."""
        for worker in (live.writer, live.reader):
            if worker is not None:
                self.pool[worker.worker_id].release(live.key)
        live.reader = live.writer = None

    def _close(self, live: Live, status: Status, now: float | None, error: str = "") -> None:
        del self._live[live.request.request_id]
        self._gate.remove(live.request.request_id)
        self._leave_workers(live)
        self._recovery.budget.ended()
        self._on_row(live.number, live.row(status, now, error))
        self._pump_soon()
