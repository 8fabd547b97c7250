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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from router.admission import Admission
from router.answer_stream import AnswerStream
from router.errors import DeadlineExceededError, RouterError, SlowReaderError, StoppingError
from router.gate_queue import GateQueue
from router.limits import Limits
from router.live import LiveRequest
from router.metrics import RouterMetrics
from router.outage import Outage
from router.pool_view import PoolView
from router.reader_pace import ReaderPace
from router.record import Detokenizes, RequestRecord
from router.recovery import RetryBudget
from router.requests import Delta, Details, Outcome, Request

_log = logging.getLogger(__name__)


class LiveRequests:
    """Lives in one event loop; every method but `stop` returns without waiting."""

    def __init__(
        self,
        pool: PoolView,
        admission: Admission,
        gate: GateQueue,
        budget: RetryBudget,
        outage: Outage,
        limits: Limits,
        metrics: RouterMetrics,
        new_detokenizer: Callable[[], Detokenizes],
        clock: Callable[[], float],
        leave_workers: Callable[[LiveRequest], None],
        pump: Callable[[], None],
    ) -> None:
        """leave_workers: makes the workers forget a request. pump: called when one came or room was left."""
        self._pool = pool
        self._admission = admission
        self._gate = gate
        self._budget = budget
        self._outage = outage
        self._metrics = metrics
        self._new_detokenizer = new_detokenizer
        self._clock = clock
        self._leave_workers = leave_workers
        self._pump = pump
        self._pace = ReaderPace(
            limits.stream_buffer_tokens, limits.slow_reader_timeout_s, metrics.paused, self._end_slow_reader
        )
        self._live: dict[str, LiveRequest] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self.stopping = False
        self.outcomes: Counter[Outcome] = Counter()

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
        self._admit(requests)
        ids = tuple(request.request_id for request in requests)
        return [self._take(request, ids, paced) for request in requests]

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
        live.stream.put(delta)
        if delta.finish is None:
            self._pace.wrote(live)
        else:
            self._close(live, delta.finish.details)

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

    def _admit(self, requests: Sequence[Request]) -> None:
        if self.stopping:
            raise StoppingError
        waiting = len(self._gate)
        refusals = (
            self._admission.refuse(request, self._pool, waiting + ahead, overdue=self._outage.overdue)
            for ahead, request in enumerate(requests)
        )
        refusal = next((refusal for refusal in refusals if refusal is not None), None)
        for request in requests:
            if refusal is None:
                self._metrics.admission("accepted", "none")
                continue
            self._metrics.admission("rejected", refusal.reason)
            if refusal.counts:
                self.outcomes[Outcome.REJECTED] += 1
                self._metrics.rejected(request.slo.slo_class)
        if refusal is not None:
            raise refusal.error

    def _take(self, request: Request, call: tuple[str, ...], paced: bool) -> AnswerStream:
        request_id = request.request_id
        stream = AnswerStream(
            cancel=lambda: self.cancel(request_id), on_read=lambda: self._on_read(request_id)
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
        self._budget.admitted()
        self._idle.clear()
        self._gate.add(request)
        self._pump()
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

    def _close(self, live: LiveRequest, details: Details) -> None:
        del self._live[live.request.request_id]
        live.timer.cancel()
        if live.pause is not None:
            live.pause.cancel()
        self._pace.ended(live)
        self._gate.remove(live.request.request_id)
        self._leave_workers(live)
        self._budget.ended()
        self.outcomes[details.outcome] += 1
        self._metrics.finished(
            live.request.slo.slo_class, details, len(live.record.token_ids), recovered=live.recovered
        )
        if not self._live:
            self._idle.set()
        self._pump()
