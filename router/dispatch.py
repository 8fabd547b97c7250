"""The life of a request in the router, on top of the cores that decide.

1. `LiveRequests.submit`: refused at once if a role has no worker (NoWorkersError), if no two workers can be
   linked (NoPairError), if the gate is full (OverloadedError) or if no worker could ever hold it
   (PromptTooLongError). Otherwise it waits at the gate.
2. A round (`pump.py`): while one of those that the gate names next finds a linked pair with room, or a mixed
   worker, it is placed there: Reserve goes to the worker that will write the answer. One that reads the
   prompt itself sends tokens, and step 3 is left out.
3. Reserved comes back: Prefill goes to the prefill worker. NO_BLOCKS comes back: to the gate again, until
   that worker's next snapshot shows room.
4. Tokens: the first one of a placement from the worker that has read the prompt, the others from the one
   that writes; `record.py` puts them in order and makes text of them, and the client's `AnswerStream` takes
   the result. A client that does not read has its decode worker paused (`reader_pace.py`). What all this
   teaches goes to `learning.py`.
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

from router import commands
from router.admission.shortage import shortage_of
from router.errors import RouterError
from router.estimates import Estimates
from router.learning import Learning
from router.lengths import OutputLengths
from router.limits import Limits
from router.live import CommandLink, LiveRequest
from router.live_requests import LiveRequests
from router.metrics import RouterMetrics
from router.outage import Outage
from router.pairing import Pairing
from router.placement.base import Decision
from router.policy import Policy
from router.pool_view import PoolView, WorkerView
from router.prefix_index import PrefixIndex
from router.pump import Pump
from router.record import Detokenizes
from router.recovery import Cause, Loss, Recovery, Verdict, judge_failed, pause_s, reason_name, worker_lost
from router.tenants import Tenants
from router.urgency import Urgency, urgency

_log = logging.getLogger(__name__)


class Dispatcher:
    """Places live requests on workers. Lives in one event loop; every method returns without waiting."""

    def __init__(
        self,
        pool: PoolView,
        prefixes: PrefixIndex,
        lengths: OutputLengths,
        estimates: Estimates,
        policy: Policy,
        recovery: Recovery,
        limits: Limits,
        metrics: RouterMetrics,
        new_detokenizer: Callable[[], Detokenizes],
        clock: Callable[[], float],
        on_change: Callable[[], None],
        tenants: Tenants,
    ) -> None:
        """on_change: called when `serving` may have changed."""
        self._pool = pool
        self._lengths = lengths
        self._estimates = estimates
        self._learning = Learning(pool, prefixes, lengths, estimates, metrics)
        self._tells_urgency = policy.tells_urgency
        self._admission, self._gate, self._placement = policy.admission, policy.gate, policy.placement
        self._retry_s = policy.retry_s
        self._recovery = recovery
        self._metrics = metrics
        self._clock = clock
        self._on_change = on_change
        self._pairing = Pairing(pool, on_change)
        self._outage = Outage(pool, limits.recovery_wait_s, self._give_up_gate)
        self._links: dict[str, CommandLink] = {}
        self._pump = Pump(self._place_next, self._placed_all, clock)
        self.live = LiveRequests(
            policy, recovery.budget, self._outage, limits, metrics, new_detokenizer, clock, tenants,
            leave_workers=self._leave_workers, pump_now=self._pump.now, pump_soon=self._pump.soon,
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
        self._pump.close()

    def worker_up(self, link: CommandLink) -> None:
        """A worker is attached and takes requests from now on; what its earlier life had is lost."""
        earlier = self._links.get(link.worker_id)
        if earlier is not None:
            self._lose(earlier, f"it was attached anew, with epoch {link.epoch}")
        self._links[link.worker_id] = link
        model = commands.latency_model(link.info)
        self._pool.add(WorkerView(link.worker_id, link.epoch, link.role, commands.capacity(link.info), model))
        self._pairing.worker_up(link, self._links.values())
        self._pool_changed()

    def worker_suspected(self, link: CommandLink) -> None:
        """A worker shows no sign of life: until it does, nothing new goes there."""
        if self._links.get(link.worker_id) is link:
            self._suspect(link, True)

    def worker_draining(self, link: CommandLink, draining: bool) -> None:
        """Somebody wants the worker empty, or no longer does."""
        if self._links.get(link.worker_id) is link:
            self._pool[link.worker_id].draining = draining
            self._pool_changed()

    def num_needing(self, link: CommandLink) -> int:
        """Requests that would be placed again if the worker went: those on their way from it included."""
        return sum(live.needs(link) for live in self.live)

    def role_changed(self, link: CommandLink) -> None:
        """A worker that writes reads prompts, too, from now on, or no longer does."""
        if self._links.get(link.worker_id) is link:
            self._pool.change_role(link.worker_id, link.role)
            self._pool_changed()

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
                now = self._clock()
                for sequence in message.step.sequences:
                    self._on_tokens(link, sequence, now)
            case "snapshot":
                self._learning.snapshot(link, message.snapshot, self._clock())
                self._suspect(link, False)
                self._pump.soon()
            case "blocks":
                self._learning.blocks(link, message.blocks)
            case "reserved":
                self._on_reserved(link, message.reserved)
            case "failed":
                self._on_failed(link, message.failed)
            case "pair":
                self._pairing.on_state(link, message.pair)
                self._outage.look()
                self._pump.soon()
            case other:
                _log.warning("worker=%s event=unexpected_message kind=%s", link.worker_id, other)

    def _lose(self, link: CommandLink, reason: str) -> None:
        self._suspect(link, False)  # it is certain now
        self._pool.down(link.worker_id)
        self._learning.forget(link.worker_id)
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
        self._pump.soon()

    def _end_misfit(self, live: LiveRequest) -> None:
        """What fits no worker must not wait at the gate: nothing behind it would be placed."""
        misfit = None if self._pool.missing_role() else self._admission.misfit(live.request)
        if misfit is not None:
            self.live.fail(live, misfit)

    def _gated(self) -> list[LiveRequest]:
        return [live for live in self.live if live.decode is None]

    def _give_up_gate(self, error: RouterError) -> None:
        """There has been no pair for too long: what waits for one ends."""
        for live in self._gated():
            self.live.fail(live, error)
        self._on_change()

    def _place_next(self, now: float) -> bool:
        """Places the first of those that are next that finds room."""
        for request in self._gate.next(now):
            live = self.live[request.request_id]
            decision = self._placement.choose(request, live.avoid, now)
            if decision is not None:
                self._place(live, decision, now)
                return True
        return False

    def _placed_all(self, now: float) -> float | None:
        """Nobody else finds room now. Returns when to look again, if somebody waits."""
        self._metrics.could_have_served(self._admission.could_have_served(now))
        return self._retry_s() if len(self._gate) else None

    def _place(self, live: LiveRequest, decision: Decision, now: float) -> None:
        request = live.request
        self._gate.placed(request.request_id)
        reader = decision.prefill or decision.decode
        key = live.record.place(now, reader, decision.decode, decision.kind)
        live.placed_at, live.expected = now, decision.expected
        live.prefill = None if decision.prefill is None else self._links[decision.prefill]
        live.decode = self._links[decision.decode]
        self._estimates.credit(key, request, decision, now)
        peer = None if live.prefill is None else commands.peer(live.prefill.info)
        number = live.decode.send(commands.reserve(key, request, peer, self._urgency(live, now)))
        self._pool[decision.decode].sent(key, number)
        self._metrics.placement(decision.kind)

    def _urgency(self, live: LiveRequest, now: float) -> Urgency | None:
        if not self._tells_urgency:
            return None
        _, tokens_to_come, _ = self._lengths.quantiles(live.request)
        return urgency(live.request, now, live.record.first_token_at, tokens_to_come)

    def _find(self, link: CommandLink, request_id: str, attempt: int) -> LiveRequest | None:
        """The live request that `link` speaks of; None when it has ended, or that attempt of it has."""
        live = self.live.get(request_id)
        if live is None or live.record.attempt != attempt or link not in (live.prefill, live.decode):
            return None
        return live

    def _suspect(self, link: CommandLink, suspected: bool) -> None:
        view = self._pool[link.worker_id]
        if view.suspected is not suspected:
            view.suspected = suspected
            self._metrics.suspected(link.role, link.worker_id, suspected)
            event = "suspected" if suspected else "no_longer_suspected"
            _log.warning("worker=%s event=%s epoch=%d", link.worker_id, event, link.epoch)

    def _on_reserved(self, link: CommandLink, reserved: worker_pb2.Reserved) -> None:
        live = self._find(link, reserved.request_id, reserved.attempt)
        if live is None or live.prefilling or live.prefill is None or live.decode is None:
            return
        live.prefilling = True
        live.travelling_tokens = max(0, live.request.num_tokens - reserved.cached_tokens)
        now, key, peer = self._clock(), live.record.key, commands.peer(live.decode.info)
        live.record.reserved(now)
        number = live.prefill.send(commands.prefill(key, live.request, peer, self._urgency(live, now)))
        self._pool[live.prefill.worker_id].sent(key, number)

    def _on_tokens(self, link: CommandLink, sequence: worker_pb2.SequenceTokens, now: float) -> None:
        live = self._find(link, sequence.request_id, sequence.attempt)
        if live is None:
            return
        if link is live.decode:
            live.decoding = True
        if link is live.prefill:
            self._pool[link.worker_id].release(live.record.key)
            self._pump.soon()
        previous = live.record.last_token_at
        if commands.is_one_token(sequence):
            delta = live.record.next_token(now, sequence.first_index, sequence.token_ids[0])
        else:
            from_reader = link is live.prefill or live.is_local
            if sequence.HasField("times") and not from_reader:
                self._learning.handed_over(live, sequence.times, now)
            delta = live.record.tokens(now, commands.token_batch(sequence, from_reader=from_reader))
        if delta is None:
            return
        self._learning.tokens(live, delta, now)
        self._metrics.tokens(live.request.slo.slo_class, now, previous, len(delta.token_ids))
        if delta.finish is not None and link is live.decode and commands.ends(sequence):
            self._forget_workers(live)  # who ends an answer has let go of it, as has its peer
        self.live.emit(live, delta)

    def _on_failed(self, link: CommandLink, failed: worker_pb2.Failed) -> None:
        live = self._find(link, failed.request_id, failed.attempt)
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
            self._end_pause(live)

    def _end_pause(self, live: LiveRequest) -> None:
        self._gate.add(live.request)
        self._pump.soon()

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
