"""The life of a request in the router, on top of the cores that decide.

1. `submit`: refused at once if a role has no worker (NoWorkersError), if the gate is full (OverloadedError)
   or if no decode worker could ever hold it (PromptTooLongError). Otherwise it waits at the gate.
2. `_pump`: while the head of the gate finds a pair with room, it is placed there: Reserve goes to the decode
   worker.
3. Reserved comes back: Prefill goes to the prefill worker. NO_BLOCKS comes back: to the gate again, until
   that worker's next snapshot shows room. PEER_UNREACHABLE: to the gate again, for another pair, a bounded
   number of times.
4. Tokens: index 0 from the prefill worker, the others from the decode worker; `record.py` puts them in order
   and makes text of them, and the client's `AnswerStream` takes the result.
5. End: the answer is complete, the client left, the deadline passed, a worker failed or went down. Legal at
   every point above; every worker that was told of the request and may still hold something of it is told
   Cancel.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from prelay.v1 import worker_pb2

from engine.sequence import RequestKey
from router import commands
from router.admission import Admission
from router.answer_stream import AnswerStream
from router.errors import (
    DeadlineExceededError,
    HandoffFailedError,
    RouterError,
    StoppingError,
    WorkerLostError,
)
from router.failures import Retry, judge_failure, reason_name
from router.gate_queue import GateQueue
from router.metrics import RouterMetrics
from router.placement.base import Pair, Placement
from router.pool_view import PoolView, Role, WorkerView
from router.record import Detokenizes, RequestRecord
from router.requests import Details, Outcome, Request

_log = logging.getLogger(__name__)


class CommandLink(Protocol):
    """What dispatching needs of a worker (`worker_link.WorkerLink`)."""

    worker_id: str
    epoch: int
    role: Role
    info: worker_pb2.WorkerInfo

    def send(self, message: worker_pb2.RouterMessage) -> int:
        """Queues a command; returns its number."""


@dataclass(slots=True)
class _Live:
    request: Request
    call: tuple[str, ...]  # ids of all requests of the same call, its own included
    record: RequestRecord
    stream: AnswerStream
    timer: asyncio.TimerHandle
    # The placement in force; both None at the gate.
    prefill: CommandLink | None = None
    decode: CommandLink | None = None
    prefilling: bool = False  # Prefill was sent
    decoding: bool = False  # the decode worker has sent a token, so the hand-off is over
    unreachable: set[Pair] = field(default_factory=set)


class Dispatcher:
    """Owns all live requests. Lives in one event loop; every method returns without waiting."""

    def __init__(
        self,
        pool: PoolView,
        admission: Admission,
        gate: GateQueue,
        placement: Placement,
        metrics: RouterMetrics,
        new_detokenizer: Callable[[], Detokenizes],
        clock: Callable[[], float],
    ) -> None:
        self._pool = pool
        self._admission = admission
        self._gate = gate
        self._placement = placement
        self._metrics = metrics
        self._new_detokenizer = new_detokenizer
        self._clock = clock
        self._links: dict[str, CommandLink] = {}
        self._live: dict[str, _Live] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self._pumping = False
        self.outcomes: Counter[Outcome] = Counter()

    @property
    def gated_requests(self) -> int:
        """Requests that wait for a pair."""
        return len(self._gate)

    @property
    def live_requests(self) -> int:
        """Requests that have not ended, those at the gate included."""
        return len(self._live)

    @property
    def serving(self) -> bool:
        """Whether a request can be taken in now."""
        return not self._stopping and self._pool.missing_role() is None

    def submit(self, request: Request) -> AnswerStream:
        """Takes a request in. Raises the RouterError with which it is refused."""
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[AnswerStream]:
        """Takes the requests of one call in: all of them, or none (the RouterError is that of the first that
        is refused). From then on they share their fate: when one fails, all do."""
        self._admit(requests)
        ids = tuple(request.request_id for request in requests)
        return [self._take(request, ids) for request in requests]

    def _take(self, request: Request, call: tuple[str, ...]) -> AnswerStream:
        stream = AnswerStream(cancel=lambda: self.cancel(request.request_id))
        self._live[request.request_id] = _Live(
            request=request,
            call=call,
            record=RequestRecord(request, self._new_detokenizer()),
            stream=stream,
            timer=asyncio.get_running_loop().call_later(
                max(0.0, request.deadline - self._clock()), self._expire, request.request_id
            ),
        )
        self._idle.clear()
        self._gate.add(request)
        self._pump()
        return stream

    def cancel(self, request_id: str) -> None:
        """The client no longer wants the answer; a request that has ended is left alone."""
        live = self._live.get(request_id)
        if live is None:
            return
        # A caller whose own deadline has passed hangs up: that is a miss of ours, not a change of mind.
        late = self._clock() >= live.request.deadline
        self._close(live, live.record.fail(self._clock(), Outcome.ERROR if late else Outcome.CANCELLED))

    def worker_up(self, link: CommandLink) -> None:
        """A worker is attached and takes requests from now on; what its earlier life had ends."""
        earlier = self._links.get(link.worker_id)
        if earlier is not None:
            self._lose(earlier, f"it was attached anew, with epoch {link.epoch}")
        self._links[link.worker_id] = link
        self._pool.add(WorkerView(link.worker_id, link.epoch, link.role, commands.capacity(link.info)))
        for live in self._live.values():  # what an earlier life could not reach, this one may
            live.unreachable = {
                pair for pair in live.unreachable if link.worker_id not in (pair.prefill, pair.decode)
            }
        self._refuse_misfits()
        self._pump()

    def worker_down(self, link: CommandLink, reason: str) -> None:
        """A worker is gone: what depends on it ends now."""
        if self._links.get(link.worker_id) is not link:
            return
        self._lose(link, reason)
        self._refuse_misfits()
        self._pump()

    def on_message(self, link: CommandLink, message: worker_pb2.WorkerMessage) -> None:
        """Whatever an attached worker says."""
        if self._links.get(link.worker_id) is not link:
            return  # an earlier life
        match message.WhichOneof("message"):
            case "step":
                for sequence in message.step.sequences:
                    self._on_tokens(link, sequence)
            case "snapshot":
                self._pool[link.worker_id].snapshot(commands.load(message.snapshot))
            case "reserved":
                self._on_reserved(link, RequestKey(message.reserved.request_id, message.reserved.attempt))
            case "failed":
                self._on_failed(link, message.failed)
            case other:
                _log.warning("worker=%s event=unexpected_message kind=%s", link.worker_id, other)
        self._pump()

    async def stop(self, grace_s: float) -> None:
        """Refuses new requests, gives live ones `grace_s` seconds to finish, fails the rest."""
        self._stopping = True
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            for live in list(self._live.values()):
                self._fail(live, StoppingError())

    def _lose(self, link: CommandLink, reason: str) -> None:
        self._pool[link.worker_id].up = False
        for live in list(self._live.values()):
            handed_over = live.decoding and live.record.token_ids
            if live.decode is link or (live.prefill is link and not handed_over):
                self._fail(live, WorkerLostError(link.worker_id, reason))
        del self._links[link.worker_id]

    def _admit(self, requests: Sequence[Request]) -> None:
        if self._stopping:
            raise StoppingError
        waiting = len(self._gate)
        refusals = (
            self._admission.refuse(request, self._pool, waiting + ahead)
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

    def _refuse_misfits(self) -> None:
        """The pool has changed: what waits at the gate and could only wait in vain ends now."""
        for live in [live for live in self._live.values() if live.decode is None]:
            refusal = self._admission.refuse(live.request, self._pool, gated_requests=0)
            if refusal is not None:
                self._fail(live, refusal.error)

    def _pump(self) -> None:
        """Places requests as long as the head of the gate finds room."""
        if self._pumping:  # a request that ends in here pumps again
            return
        self._pumping = True
        try:
            while (request := self._gate.head(now := self._clock())) is not None:
                live = self._live[request.request_id]
                pair = self._placement.choose(request, self._pool, live.unreachable, now)
                if pair is not None:
                    self._place(live, pair, now)
                elif self._no_pair_left(live):
                    self._fail(live, HandoffFailedError("no decode worker can reach a prefill worker"))
                else:
                    return
        finally:
            self._pumping = False

    def _no_pair_left(self, live: _Live) -> bool:
        if not live.unreachable:
            return False
        decodes = self._pool.up(Role.DECODE)
        pairs = {Pair(one.worker_id, two.worker_id) for one in self._pool.up(Role.PREFILL) for two in decodes}
        # Without any pair it is a matter of workers that are down, which ends requests elsewhere.
        return bool(pairs) and pairs <= live.unreachable

    def _place(self, live: _Live, pair: Pair, now: float) -> None:
        request = live.request
        self._gate.remove(request.request_id)
        key = live.record.place(now, pair.prefill, pair.decode)
        live.prefill, live.decode = self._links[pair.prefill], self._links[pair.decode]
        decode_view = self._pool[pair.decode]
        blocks = decode_view.capacity.reserved_blocks(
            len(request.prompt_token_ids), request.sampling.max_tokens
        )
        self._pool[pair.prefill].credit(key, tokens=len(request.prompt_token_ids), blocks=0)
        decode_view.credit(key, tokens=0, blocks=blocks)
        number = live.decode.send(commands.reserve(key, request, commands.peer(live.prefill.info)))
        decode_view.sent(key, number)
        self._metrics.placement("disaggregated")

    def _find(self, link: CommandLink, key: RequestKey) -> _Live | None:
        """The live request that `link` speaks of; None when it has ended, or that attempt of it has."""
        live = self._live.get(key.request_id)
        if live is None or live.record.attempt != key.attempt or link not in (live.prefill, live.decode):
            return None
        return live

    def _on_reserved(self, link: CommandLink, key: RequestKey) -> None:
        live = self._find(link, key)
        if live is None or live.prefilling or live.prefill is None or live.decode is None:
            return
        live.prefilling = True
        live.record.reserved(self._clock())
        number = live.prefill.send(commands.prefill(key, live.request, commands.peer(live.decode.info)))
        self._pool[live.prefill.worker_id].sent(key, number)

    def _on_tokens(self, link: CommandLink, sequence: worker_pb2.SequenceTokens) -> None:
        key = RequestKey(sequence.request_id, sequence.attempt)
        live = self._find(link, key)
        if live is None:
            return
        if link is live.decode:
            live.decoding = True
        if link is live.prefill:
            self._pool[link.worker_id].release(key)
        now = self._clock()
        previous = live.record.last_token_at
        delta = live.record.tokens(now, commands.token_batch(sequence))
        if delta is None:
            return
        self._metrics.tokens(live.request.slo.slo_class, now, previous, len(delta.token_ids))
        live.stream.put(delta)
        if delta.finish is not None:
            # A decode worker that ended the answer itself holds nothing of it any more, nor does its peer.
            ended_there = link is live.decode and sequence.stop_reason != worker_pb2.STOP_REASON_UNSPECIFIED
            self._close(live, delta.finish.details, tell_workers=not ended_there)

    def _on_failed(self, link: CommandLink, failed: worker_pb2.Failed) -> None:
        live = self._find(link, RequestKey(failed.request_id, failed.attempt))
        if live is None:
            return
        _log.info(
            "request=%s attempt=%d worker=%s event=failed reason=%s message=%r",
            failed.request_id, failed.attempt, link.worker_id, reason_name(failed), failed.message,
        )  # fmt: skip
        if failed.reason == worker_pb2.FAILURE_REASON_PEER_UNREACHABLE:
            live.unreachable.add(Pair(live.record.prefill_worker, live.record.decode_worker))
        elif failed.reason == worker_pb2.FAILURE_REASON_NO_BLOCKS:
            self._pool[link.worker_id].refuse()
        verdict = judge_failure(
            link.worker_id,
            failed,
            num_emitted=len(live.record.token_ids),
            num_unreachable=len(live.unreachable),
        )
        if isinstance(verdict, Retry):
            self._retry(live)
        else:
            self._fail(live, verdict)

    def _retry(self, live: _Live) -> None:
        """Back to the gate; whoever was told of the attempt that failed forgets it."""
        self._leave_workers(live, tell=True)
        live.record.retry(self._clock())
        self._gate.add(live.request)

    def _expire(self, request_id: str) -> None:
        live = self._live[request_id]
        after_s = live.request.deadline - live.request.arrived_at
        self._fail(live, DeadlineExceededError(f"the answer was not complete after {after_s:.3g} s"))

    def _fail(self, live: _Live, error: RouterError) -> None:
        """Ends the whole call that `live` is part of; what of it has ended already is left alone."""
        for request_id in live.call:
            self._gate.remove(request_id)  # before the room that the others leave is given to one of them
        for request_id in live.call:
            if request_id in self._live:
                self._fail_one(self._live[request_id], error)

    def _fail_one(self, live: _Live, error: RouterError) -> None:
        details = live.record.fail(self._clock(), Outcome.ERROR)
        _log.warning(
            "request=%s tenant=%r event=ended_with_error prefill=%s decode=%s tokens=%d error=%r",
            live.request.request_id, live.request.tenant, live.record.prefill_worker,
            live.record.decode_worker, len(live.record.token_ids), str(error),
        )  # fmt: skip
        live.stream.fail(error)
        self._close(live, details)

    def _close(self, live: _Live, details: Details, *, tell_workers: bool = True) -> None:
        del self._live[live.request.request_id]
        live.timer.cancel()
        self._gate.remove(live.request.request_id)
        self._leave_workers(live, tell=tell_workers)
        self.outcomes[details.outcome] += 1
        self._metrics.finished(live.request.slo.slo_class, details, len(live.record.token_ids))
        if not self._live:
            self._idle.set()
        self._pump()

    def _leave_workers(self, live: _Live, *, tell: bool) -> None:
        key = live.record.key
        told = [(live.decode, True), (live.prefill, live.prefilling)]
        for link, knows in told:
            if link is None:
                continue
            if self._links.get(link.worker_id) is link:
                self._pool[link.worker_id].release(key)
            if tell and knows:
                link.send(commands.cancel(key))
        live.prefill = live.decode = None
        live.prefilling = live.decoding = False
