"""The life of a request in the router, on top of the cores that decide.

1. `LiveRequests.submit`: refused at once if a role has no worker (NoWorkersError), if no two workers can be
   linked (NoPairError), if the gate is full (OverloadedError) or if no worker could ever hold it
   (PromptTooLongError). Otherwise it waits at the gate.
2. `_pump`: while the head of the gate finds a linked pair with room, it is placed there: Reserve goes to the
   decode worker.
3. Reserved comes back: Prefill goes to the prefill worker. NO_BLOCKS comes back: to the gate again, until
   that worker's next snapshot shows room.
4. Tokens: the first one of a placement from the prefill worker, the others from the decode worker;
   `record.py` puts them in order and makes text of them, and the client's `AnswerStream` takes the result.
   A client that does not read has its decode worker paused (`reader_pace.py`).
5. Loss: a worker of the placement is gone, or says that it failed. Within the limits of `recovery.py` the
   request goes to the gate again, ahead of all that arrived after it, and goes on after the tokens that its
   client has. While there is no pair for it, it waits for a while (`outage.py`).
6. End (`live_requests.py`): the answer is complete, the client left, the deadline passed, a limit was
   reached. Legal at every point above.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from prelay.v1 import worker_pb2

from engine.sequence import RequestKey
from router import commands
from router.admission import Admission, shortage_of
from router.errors import RouterError
from router.gate_queue import GateQueue
from router.limits import Limits
from router.live import CommandLink, LiveRequest
from router.live_requests import LiveRequests
from router.metrics import RouterMetrics
from router.outage import Outage
from router.pair_table import Pair
from router.pairing import Pairing
from router.placement.base import Placement
from router.pool_view import PoolView, WorkerView
from router.record import Detokenizes
from router.recovery import Cause, Loss, Recovery, Verdict, judge_failed, pause_s, reason_name, worker_lost

_log = logging.getLogger(__name__)


class Dispatcher:
    """Places live requests on workers. Lives in one event loop; every method returns without waiting."""

    def __init__(
        self,
        pool: PoolView,
        admission: Admission,
        gate: GateQueue,
        placement: Placement,
        recovery: Recovery,
        limits: Limits,
        metrics: RouterMetrics,
        new_detokenizer: Callable[[], Detokenizes],
        clock: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        """on_change: called when `serving` may have changed."""
        self._pool = pool
        self._admission = admission
        self._gate = gate
        self._placement = placement
        self._recovery = recovery
        self._metrics = metrics
        self._clock = clock
        self._on_change = on_change
        self._pairing = Pairing(pool, on_change)
        self._outage = Outage(pool, limits.recovery_wait_s, self._give_up_gate)
        self._links: dict[str, CommandLink] = {}
        self._pumping = False
        self.live = LiveRequests(
            pool, admission, gate, recovery.budget, self._outage, limits, metrics, new_detokenizer, clock,
            leave_workers=self._leave_workers, pump=self._pump,
        )  # fmt: skip

    @property
    def serving(self) -> bool:
        """Whether a request can be taken in now."""
        shortage = shortage_of(self._pool)
        waits = shortage is None or (shortage.passes and not self._outage.overdue)
        return waits and not self.live.stopping

    def close(self) -> None:
        """No timer fires any more."""
        self._outage.close()

    def worker_up(self, link: CommandLink) -> None:
        """A worker is attached and takes requests from now on; what its earlier life had is lost."""
        earlier = self._links.get(link.worker_id)
        if earlier is not None:
            self._lose(earlier, f"it was attached anew, with epoch {link.epoch}")
        self._links[link.worker_id] = link
        self._pool.add(WorkerView(link.worker_id, link.epoch, link.role, commands.capacity(link.info)))
        self._pairing.worker_up(link, self._links.values())
        self._pool_changed()

    def worker_suspected(self, link: CommandLink) -> None:
        """A worker shows no sign of life: until it does, nothing new goes there."""
        if self._links.get(link.worker_id) is link:
            self._suspect(link, True)

    def worker_down(self, link: CommandLink, reason: str) -> None:
        """A worker is gone: what depends on it is placed again."""
        if self._links.get(link.worker_id) is link:
            self._lose(link, reason)
            self._pool_changed()

    def life_over(self, link: CommandLink) -> None:
        """A worker will not come back in this life: nobody has to look for it any more."""
        self._pairing.life_over(link, self._links.values())

    def on_message(self, link: CommandLink, message: worker_pb2.WorkerMessage) -> None:
        """Whatever an attached worker says."""
        if self._links.get(link.worker_id) is not link:
            return  # an earlier life
        match message.WhichOneof("message"):
            case "step":
                for sequence in message.step.sequences:
                    self._on_tokens(link, sequence)
            case "snapshot":
                self._on_snapshot(link, message.snapshot)
            case "reserved":
                self._on_reserved(link, RequestKey(message.reserved.request_id, message.reserved.attempt))
            case "failed":
                self._on_failed(link, message.failed)
            case "pair":
                self._pairing.on_state(link, message.pair)
                self._outage.look()
            case other:
                _log.warning("worker=%s event=unexpected_message kind=%s", link.worker_id, other)
        self._pump()

    def _lose(self, link: CommandLink, reason: str) -> None:
        self._suspect(link, False)  # it is certain now
        self._pool.down(link.worker_id)
        for live in self.live:
            if live.needs(link):
                self._recover(live, worker_lost(link.worker_id, reason))
            elif live.prefill is link:
                live.prefill = None  # it has done its part
        del self._links[link.worker_id]

    def _pool_changed(self) -> None:
        """What waits at the gate and fits no worker any more ends now; the others may find room."""
        self._outage.look()
        for live in self._gated():
            self._end_misfit(live)
        self._pump()

    def _end_misfit(self, live: LiveRequest) -> None:
        """What fits no worker must not wait at the gate: nothing behind it would be placed."""
        misfit = None if self._pool.missing_role() else self._admission.misfit(live.request, self._pool)
        if misfit is not None:
            self.live.fail(live, misfit)

    def _gated(self) -> list[LiveRequest]:
        return [live for live in self.live if live.decode is None]

    def _give_up_gate(self, error: RouterError) -> None:
        """There has been no pair for too long: what waits for one ends."""
        for live in self._gated():
            self.live.fail(live, error)
        self._on_change()

    def _pump(self) -> None:
        """Places requests as long as the head of the gate finds room."""
        if self._pumping:  # a request that ends in here pumps again
            return
        self._pumping = True
        try:
            while (request := self._gate.head(now := self._clock())) is not None:
                live = self.live[request.request_id]
                pair = self._placement.choose(request, self._pool, live.avoid, now)
                if pair is None:
                    return
                self._place(live, pair, now)
        finally:
            self._pumping = False

    def _place(self, live: LiveRequest, pair: Pair, now: float) -> None:
        request = live.request
        self._gate.remove(request.request_id)
        key = live.record.place(now, pair.prefill, pair.decode)
        live.prefill, live.decode = self._links[pair.prefill], self._links[pair.decode]
        decode_view = self._pool[pair.decode]
        blocks = decode_view.capacity.reserved_blocks(request.num_tokens, request.tokens_left)
        self._pool[pair.prefill].credit(key, tokens=request.num_tokens, blocks=0)
        decode_view.credit(key, tokens=0, blocks=blocks)
        number = live.decode.send(commands.reserve(key, request, commands.peer(live.prefill.info)))
        decode_view.sent(key, number)
        self._metrics.placement("disaggregated")

    def _find(self, link: CommandLink, key: RequestKey) -> LiveRequest | None:
        """The live request that `link` speaks of; None when it has ended, or that attempt of it has."""
        live = self.live.get(key.request_id)
        if live is None or live.record.attempt != key.attempt or link not in (live.prefill, live.decode):
            return None
        return live

    def _on_snapshot(self, link: CommandLink, snapshot: worker_pb2.Snapshot) -> None:
        self._pool[link.worker_id].snapshot(commands.load(snapshot))
        self._suspect(link, False)

    def _suspect(self, link: CommandLink, suspected: bool) -> None:
        view = self._pool[link.worker_id]
        if view.suspected is not suspected:
            view.suspected = suspected
            self._metrics.suspected(link.role, link.worker_id, suspected)
            event = "suspected" if suspected else "no_longer_suspected"
            _log.warning("worker=%s event=%s epoch=%d", link.worker_id, event, link.epoch)

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
        delta = live.record.tokens(now, commands.token_batch(sequence, link.role))
        if delta is None:
            return
        self._metrics.tokens(live.request.slo.slo_class, now, previous, len(delta.token_ids))
        if delta.finish is not None and link is live.decode and commands.ends(sequence):
            self._forget_workers(live)  # who ends an answer has let go of it, as has its peer
        self.live.emit(live, delta)

    def _on_failed(self, link: CommandLink, failed: worker_pb2.Failed) -> None:
        live = self._find(link, RequestKey(failed.request_id, failed.attempt))
        if live is None:
            return
        _log.info(
            "request=%s attempt=%d worker=%s event=failed reason=%s message=%r",
            failed.request_id, failed.attempt, link.worker_id, reason_name(failed), failed.message,
        )  # fmt: skip
        match judge_failed(link.worker_id, failed):
            case Loss() as loss:
                not_linked = loss.cause in (Cause.PEER_UNREACHABLE, Cause.PEER_MISMATCH)
                if not_linked and live.prefill is not None and live.decode is not None:
                    self._pairing.ask(live.prefill, live.decode)
                live.avoid |= {live.record.prefill_worker, live.record.decode_worker}
                self._recover(live, loss)
                self._end_misfit(live)  # it has grown since it was let in
            case Verdict():
                self._pool[link.worker_id].refuse()
                self._to_gate(live)
            case error:
                self.live.fail(live, error)

    def _recover(self, live: LiveRequest, loss: Loss) -> None:
        """The placement of `live` is lost: it gets another one, or ends."""
        live.lost_attempts += 1
        verdict = self._recovery.judge(loss, live.lost_attempts)
        if isinstance(verdict, RouterError):
            self.live.fail(live, verdict)
            return
        _log.info(
            "request=%s attempt=%d event=placed_again tokens=%d cause=%s reason=%r",
            live.request.request_id, live.record.attempt, len(live.record.token_ids), loss.cause,
            loss.message,
        )  # fmt: skip
        self._metrics.recovery(loss.cause)
        live.recovered = live.recovered or bool(live.record.token_ids)
        self._to_gate(live, pause_s(loss, live.lost_attempts))
        self._outage.look()

    def _to_gate(self, live: LiveRequest, after_s: float = 0.0) -> None:
        """Whoever was told of the placement forgets it; the next one goes on after what the client has."""
        self._leave_workers(live)
        live.record.lost(self._clock())
        live.request = live.request.going_on(live.record.token_ids)
        if after_s:
            loop = asyncio.get_running_loop()
            live.pause = loop.call_later(after_s, self._end_pause, live)
        else:
            self._gate.add(live.request)

    def _end_pause(self, live: LiveRequest) -> None:
        self._gate.add(live.request)
        self._pump()

    def _leave_workers(self, live: LiveRequest) -> None:
        """Whoever was told of the placement and may still hold something of it is told Cancel."""
        if live.decode is not None:
            live.decode.send(commands.cancel(live.record.key))
        if live.prefill is not None and live.prefilling:
            live.prefill.send(commands.cancel(live.record.key))
        self._forget_workers(live)

    def _forget_workers(self, live: LiveRequest) -> None:
        for link in (live.decode, live.prefill):
            if link is not None and self._links.get(link.worker_id) is link:
                self._pool[link.worker_id].release(live.record.key)
        live.prefill = live.decode = None
        live.prefilling = live.decoding = live.paused = False
