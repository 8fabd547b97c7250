"""All requests that have not ended: how they are let in, and how they end.

    submit --refused--> RouterError, at once
       |
       +--let in--> at the gate, placed, at the gate again ... (`dispatch.py`) --> closed, once

A request is closed when its answer is complete, when its client leaves, when its deadline passes, or when it
has failed for good. That is legal at any moment; every worker that may still hold something of it is told
Cancel in the same turn of the event loop, its outcome is counted, and nothing of it stays here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence

from router.admission.base import Refusal
from router.answer_stream import AnswerStream
from router.errors import DeadlineExceededError, RouterError, SlowReaderError, StoppingError
from router.limits import Limits
from router.live import LiveRequest
from router.metrics import RouterMetrics
from router.outage import Outage
from router.policy import Policy
from router.reader_pace import ReaderPace
from router.reader_turns import ReaderTurns
from router.record import Detokenizes, RequestRecord
from router.recovery import RetryBudget
from router.requests import Delta, Details, Outcome, Request
from router.tally import Tally
from router.tenants import Tenants
from router.workload_profile import WorkloadProfile

_log = logging.getLogger(__name__)


class LiveRequests:
    """Lives in one event loop; every method but `stop` returns without waiting."""

    def __init__(
        self,
        policy: Policy,
        budget: RetryBudget,
        outage: Outage,
        limits: Limits,
        metrics: RouterMetrics,
        new_detokenizer: Callable[[], Detokenizes],
        clock: Callable[[], float],
        tenants: Tenants,
        leave_workers: Callable[[LiveRequest], None],
        pump_now: Callable[[], None],
        pump_soon: Callable[[], None],
    ) -> None:
        """leave_workers: makes the workers forget a request. pump_now: called when one came. pump_soon:
        called when one has left room."""
        self._admission, self._gate = policy.admission, policy.gate
        self._budget = budget
        self._outage = outage
        self._metrics = metrics
        self._new_detokenizer = new_detokenizer
        self._clock = clock
        self._tenants = tenants
        self._leave_workers = leave_workers
        self._pump_now, self._pump_soon = pump_now, pump_soon
        self._pace = ReaderPace(
            limits.stream_buffer_tokens, limits.slow_reader_timeout_s, metrics.paused, self._end_slow_reader
        )
        self._turns = ReaderTurns()
        self._live: dict[str, LiveRequest] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self.stopping = False
        self.tally = Tally()
        self.workload = WorkloadProfile(clock())

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[LiveRequest]:
        """Of those that are here now; they may end meanwhile."""
        return iter(list(self._live.values()))

    def __getitem__(self, request_id: str) -> LiveRequest:
        return self._live[request_id]

    def get(self, request_id: str) -> LiveRequest | None:
        """The request, if it has not ended."""
        return self._live.get(request_id)

    @property
    def gated(self) -> int:
        """Requests that wait for a pair."""
        return len(self._gate)

    def submit(self, request: Request) -> AnswerStream:
        """Takes a request in. Raises the RouterError with which it is refused."""
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request], *, paced: bool = True) -> list[AnswerStream]:
        """Takes the requests of one call in: all of them, or none (the RouterError is that of the first that
        is refused). From then on they share their fate: when one fails, all do.

        paced: whether the reader may be slow; one who reads at once, whatever comes, is never waited for.
        """
        admitted = self._admit(requests)
        ids = tuple(request.request_id for request in admitted)
        return [self._take(request, ids, paced) for request in admitted]

    def cancel(self, request_id: str) -> None:
        """The client no longer wants the answer; a request that has ended is left alone."""
        live = self._live.get(request_id)
        if live is None:
            return
        # A caller whose own deadline has passed hangs up: that is a miss of ours, not a change of mind.
        late = self._clock() >= live.request.deadline
        self._close(live, live.record.fail(self._clock(), Outcome.ERROR if late else Outcome.CANCELLED))

    def emit(self, live: LiveRequest, delta: Delta) -> None:
        """More of the answer, or the rest of it."""
        self.tally.tokens += len(delta.token_ids)
        self._waits_no_more(live)
        live.stream.put(delta)
        finish = delta.finish
        if finish is None:
            self._pace.wrote(live)
            return
        self.workload.ended(
            self._clock(),
            finish.prompt_tokens,
            finish.completion_tokens,
            finish.cached_tokens,
        )
        self._close(live, finish.details)

    def fail(self, live: LiveRequest, error: RouterError) -> None:
        """Ends the whole call that `live` is part of; what of it has ended already is left alone."""
        for request_id in live.call:
            self._gate.remove(request_id)  # before the room that the others leave is given to one of them
        for request_id in live.call:
            if request_id in self._live:
                self._fail_one(self._live[request_id], error)

    async def stop(self, grace_s: float) -> None:
        """Refuses new requests, gives live ones `grace_s` seconds to finish, fails the rest."""
        self.stopping = True
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            for live in self:
                self.fail(live, StoppingError())

    def _admit(self, requests: Sequence[Request]) -> list[Request]:
        if self.stopping:
            raise StoppingError
        now, overdue = self._clock(), self._outage.overdue
        self._tenants.admit(requests, now)
        admitted: list[Request] = []
        refusal: Refusal | None = None
        for _ in requests:
            self.workload.arrived(now)
        for request in requests:
            verdict = self._admission.judge(request, now, len(admitted), overdue=overdue)
            if isinstance(verdict, Refusal):
                refusal = verdict
                break
            admitted.append(verdict)
        if refusal is not None:
            self._tenants.refused(requests, now)
            for request in requests:
                self._metrics.admission("rejected", refusal.reason)
                if refusal.counts:
                    self.tally.rejected(request.slo.slo_class)
                    self._metrics.rejected(request.slo.slo_class)
            raise refusal.error
        for request, let_in in zip(requests, admitted, strict=True):
            downgraded = request.slo is not let_in.slo
            self._metrics.admission(*(("downgraded", "late") if downgraded else ("accepted", "none")))
        return admitted

    def _take(self, request: Request, call: tuple[str, ...], paced: bool) -> AnswerStream:
        request_id = request.request_id
        stream = AnswerStream(
            cancel=lambda: self.cancel(request_id),
            on_read=lambda: self._on_read(request_id),
            turns=self._turns,
        )
        self._live[request_id] = LiveRequest(
            request=request,
            call=call,
            record=RequestRecord(request, self._new_detokenizer()),
            stream=stream,
            timer=asyncio.get_running_loop().call_later(
                max(0.0, request.deadline - self._clock()), self._expire, request_id
            ),
            paced=paced,
        )
        self._tenants.waits(request)
        self._budget.admitted()
        self._idle.clear()
        self._gate.add(request)
        self._pump_now()
        return stream

    def _on_read(self, request_id: str) -> None:
        live = self._live.get(request_id)
        if live is not None:
            self._pace.read(live)

    def _expire(self, request_id: str) -> None:
        live = self._live[request_id]
        after_s = live.request.deadline - live.request.arrived_at
        self.fail(live, DeadlineExceededError(f"the answer was not complete after {after_s:.3g} s"))

    def _end_slow_reader(self, live: LiveRequest, timeout_s: float) -> None:
        self.fail(live, SlowReaderError(live.stream.unread_tokens, timeout_s))

    def _fail_one(self, live: LiveRequest, error: RouterError) -> None:
        details = live.record.fail(self._clock(), Outcome.ERROR)
        _log.warning(
            "request=%s tenant=%r event=ended_with_error prefill=%s decode=%s tokens=%d error=%r",
            live.request.request_id, live.request.tenant, live.record.prefill_worker,
            live.record.decode_worker, len(live.record.token_ids), str(error),
        )  # fmt: skip
        live.stream.fail(error)
        self._close(live, details)

    def _waits_no_more(self, live: LiveRequest) -> None:
        if live.waits:
            live.waits = False
            self._tenants.waits_no_more(live.request)

    def _close(self, live: LiveRequest, details: Details) -> None:
        del self._live[live.request.request_id]
        self._waits_no_more(live)
        live.timer.cancel()
        if live.pause is not None:
            live.pause.cancel()
        self._pace.ended(live)
        self._gate.remove(live.request.request_id)
        self._leave_workers(live)
        self._budget.ended()
        num_tokens = len(live.record.token_ids)
        self._tenants.answered(live.request.tenant, num_tokens, self._clock())
        self.tally.ended(details, num_tokens)
        self._metrics.finished(details, num_tokens, recovered=live.recovered)
        if not self._live:
            self._idle.set()
        self._pump_soon()
