"""All workers that this router was told about: attaching them, watching over them, forgetting them."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable

from engine.latency import ProfileError
from engine.tls import Identity
from router.commands import latency_model
from router.dispatch import Dispatcher
from router.errors import WorkerRefusedError
from router.metrics import RouterMetrics
from router.pool_view import PoolView, Role
from router.worker_link import Registration, WorkerLink, connect

CONNECT_TIMEOUT_S = 10.0
"""A worker registers when it is ready, so it answers a hello at once or not at all."""

WATCHES_PER_TIMEOUT = 6
"""How often signs of life are checked within one liveness timeout."""

_log = logging.getLogger(__name__)


class Workers:
    """The links by worker id. A worker that is down stays listed until it is removed or replaced."""

    def __init__(
        self,
        router_id: str,
        pool: PoolView,
        dispatcher: Dispatcher,
        metrics: RouterMetrics,
        max_model_len: int,
        vocab_size: int,
        suspect_after_s: float,
        liveness_timeout_s: float,
        clock: Callable[[], float],
        on_change: Callable[[], None],
        identity: Identity | None = None,
    ) -> None:
        """on_change: called after any worker came up, went down or was forgotten. identity: with which they
        are dialled; None is without TLS."""
        self._router_id = router_id
        self._pool = pool
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._suspect_after_s = suspect_after_s
        self._liveness_timeout_s = liveness_timeout_s
        self._clock = clock
        self._on_change = on_change
        self._identity = identity
        self._links: dict[str, WorkerLink] = {}
        # By worker id, so that two lives of one worker are compared one after the other.
        self._registering: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._closing: set[asyncio.Task[None]] = set()
        self._watched_at = clock()

    def links(self) -> list[WorkerLink]:
        """Of all registered workers, those that are down included."""
        return list(self._links.values())

    def suspected(self, link: WorkerLink) -> bool:
        """Whether the worker has shown no sign of life for a while."""
        return link.up and self._pool[link.worker_id].suspected

    def draining(self, link: WorkerLink) -> bool:
        """Whether the worker gets nothing new as somebody wants it empty."""
        return link.up and self._pool[link.worker_id].draining

    def live_requests(self, link: WorkerLink) -> int:
        """Requests that this router has on the worker."""
        return self._pool[link.worker_id].live_requests if link.up else 0

    async def register(self, registration: Registration) -> None:
        """Attaches a worker; a known one that is down or has a new epoch takes the place of its earlier life.
        In one life of a worker decode and mixed can be exchanged for each other.

        Raises WorkerRefusedError for an epoch older than the one known, and for a worker that cannot serve
        here; WorkerUnreachableError when it does not answer.
        """
        async with self._registering[registration.worker_id]:
            known = self._links.get(registration.worker_id)
            if known is not None and known.epoch > registration.epoch:
                raise WorkerRefusedError(
                    f"worker {registration.worker_id} is known with epoch {known.epoch}, so epoch "
                    f"{registration.epoch} is an earlier life of it: register the one that lives now"
                )
            if known is not None and known.epoch == registration.epoch and known.up:
                if known.role is not registration.role:
                    self._change_role(known, registration.role)
                return  # or said twice
            link = await connect(registration, self._router_id, CONNECT_TIMEOUT_S, self._identity)
            try:
                self._check(link)
            except WorkerRefusedError:
                await link.close()
                raise
            same_life = known is not None and known.epoch == link.epoch
            view = self._pool.get(link.worker_id)
            was_draining = same_life and view is not None and view.draining
            self._links[link.worker_id] = link
            link.start(self._dispatcher.on_message, self._on_down)
            if known is not None and known.epoch != link.epoch:
                self._dispatcher.life_over(known)
            self._dispatcher.worker_up(link)
            if was_draining:
                self._dispatcher.worker_draining(link, True)
            if known is not None:
                self._metrics.worker_removed(known.role, known.worker_id)
                self._close_later(known)
            _log.info(
                "worker=%s event=up role=%s epoch=%d address=%s",
                link.worker_id, link.role, link.epoch, registration.address,
            )  # fmt: skip
            self._report()

    def drain(self, worker_id: str, epoch: int, *, draining: bool) -> int | None:
        """Whether that life of the worker gets nothing new. Returns how many requests of this router it has;
        None when it is not attached."""
        link = self._links.get(worker_id)
        if link is None or link.epoch != epoch or not link.up:
            return None
        if self.draining(link) is not draining:
            _log.info("worker=%s event=%s epoch=%d", worker_id, "drain" if draining else "drain_over", epoch)
            self._dispatcher.worker_draining(link, draining)
        return self._dispatcher.num_needing(link)

    def remove(self, worker_id: str, epoch: int, *, comes_back: bool = False) -> bool:
        """Forgets that life of the worker; its requests are placed again. False when it is not known.

        comes_back: it is part of the deployment all the same, and down until its next life is registered.
        """
        link = self._links.get(worker_id)
        if link is None or link.epoch != epoch:
            return False
        if comes_back:
            link.fail("this life of it is over")
            self._dispatcher.life_over(link)
            return True
        _log.info("worker=%s event=removed epoch=%d", link.worker_id, link.epoch)
        self._dispatcher.worker_down(link, "it was removed")
        self._dispatcher.life_over(link)
        del self._links[worker_id]
        self._pool.remove(worker_id)
        self._metrics.worker_removed(link.role, worker_id)
        self._close_later(link)
        self._report()
        return True

    def watch(self) -> None:
        """Declares workers suspected, then down, that have shown no sign of life for too long; to be called
        on a beat.

        Silence is counted in time during which this process was awake: after a pause of its own (a long stop,
        a busy machine) the workers' snapshots are still in the socket, and are read before the next beat.
        """
        now = self._clock()
        elapsed_s = min(now - self._watched_at, 2 * self._liveness_timeout_s / WATCHES_PER_TIMEOUT)
        self._watched_at = now
        for link in list(self._links.values()):
            silent_s = link.silent(elapsed_s) if link.up else 0.0
            if silent_s > self._liveness_timeout_s:
                link.fail(f"no sign of life for {self._liveness_timeout_s:g} s")
            elif silent_s > self._suspect_after_s:
                self._dispatcher.worker_suspected(link)

    async def keep_watch(self) -> None:
        """Watches for ever."""
        while True:
            await asyncio.sleep(self._liveness_timeout_s / WATCHES_PER_TIMEOUT)
            self.watch()

    async def close(self) -> None:
        """Ends all streams; workers cancel what is left."""
        await asyncio.gather(*(link.close() for link in self._links.values()), *self._closing)

    def _check(self, link: WorkerLink) -> None:
        info = link.info
        if info.max_model_len < self._max_model_len:
            raise WorkerRefusedError(
                f"worker {link.worker_id} takes {info.max_model_len} tokens, but {self._max_model_len} are "
                "promised to clients: start it with the same max_model_len"
            )
        if info.vocab_size and info.vocab_size != self._vocab_size:
            raise WorkerRefusedError(
                f"worker {link.worker_id} has a vocabulary of {info.vocab_size} tokens, but the router's "
                f"checkpoint has {self._vocab_size}: both must read the same checkpoint"
            )
        try:
            latency_model(info)
        except ProfileError as error:
            message = f"worker {link.worker_id} does not say how long its steps take: {error}"
            raise WorkerRefusedError(message) from error
        for other in self._links.values():
            same = other.info.model_fingerprint == info.model_fingerprint
            if other.worker_id != link.worker_id and other.up and not same:
                raise WorkerRefusedError(
                    f"worker {link.worker_id} has model_fingerprint {info.model_fingerprint!r}, "
                    f"but {other.worker_id} has {other.info.model_fingerprint!r}: "
                    "all must load the same checkpoint"
                )

    def _change_role(self, link: WorkerLink, role: Role) -> None:
        if not (link.role.writes and role.writes):
            raise WorkerRefusedError(
                f"worker {link.worker_id} is attached as {link.role} with epoch {link.epoch}: as {role} it "
                "must live anew, with a greater epoch"
            )
        _log.info("worker=%s event=role from=%s to=%s epoch=%d", link.worker_id, link.role, role, link.epoch)
        self._metrics.worker_removed(link.role, link.worker_id)
        link.take_role(role)
        self._dispatcher.role_changed(link)
        self._report()

    def _on_down(self, link: WorkerLink, reason: str) -> None:
        _log.warning(
            "worker=%s event=down role=%s epoch=%d reason=%r", link.worker_id, link.role, link.epoch, reason
        )
        self._dispatcher.worker_down(link, reason)
        self._close_later(link)
        self._report()

    def _close_later(self, link: WorkerLink) -> None:
        task = asyncio.create_task(link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _report(self) -> None:
        for role in Role:
            held = (max(1, link.info.num_devices) for link in self._links.values() if link.role is role)
            self._metrics.devices(role, sum(held))
        for link in self._links.values():
            self._metrics.worker(link.role, link.worker_id, link.epoch, up=link.up)
        self._on_change()
