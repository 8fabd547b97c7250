"""One worker's lives: started, attached to the router, and started again under a new epoch when it dies.

      start -> attach -> serve -> dead --(backoff)--> start ...
        |        ^         |                            |
        |        +- lost --+ (killed after              +-- fails `max_failures` times in a row: WorkerError
        |                     `unresponsive_s`)
        +-- fails before it ever served: WorkerError

A life that has served for `steady_s` clears the count of failures. Lost is a worker whose process lives but
which the router has given up, because it was silent for a while: it is attached again as soon as it answers.

A life may also end because its worker is to have another role (`become`): the next one begins in the same
process, on the weights that it has loaded. If that fails, the process is ended, and what is started after it
has the new role.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray.exceptions
from prelay.v1 import worker_pb2
from ray.exceptions import RayActorError, RayTaskError

from cluster.actor_calls import cause, first_line, result, why_it_ended
from cluster.errors import ClusterError, ModelError, WorkerError
from cluster.host import Progress, StartReport, WorkerHost
from cluster.host_spec import HostSpec
from cluster.ray_cluster import Left, Place, RayCluster
from cluster.reporter import Reporter
from cluster.router_admin import Routers
from engine.errors import EngineError

_POLL_S = 0.2
_STOP_TIMEOUT_S = 4.0
_ANSWER_TIMEOUT_S = 3.0
_RENEW_TIMEOUT_S = 600.0
_BECOME_TIMEOUT_S = 30.0
"""Of which a few seconds are for measuring steps, and the rest for a machine that is busy."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """backoff_s: before the first restart; doubled with each failure in a row, up to max_backoff_s.

    unresponsive_s: how long a worker may be lost before its process is ended.
    """

    backoff_s: float = 0.2
    max_backoff_s: float = 10.0
    max_failures: int = 6
    steady_s: float = 10.0
    unresponsive_s: float = 10.0

    def delay_s(self, failures: int) -> float:
        """Before the restart that follows `failures` failures in a row."""
        return min(self.backoff_s * 2.0 ** (failures - 1), self.max_backoff_s)


@dataclass(frozen=True, slots=True)
class LiveWorker:
    """A worker that serves."""

    info: worker_pb2.WorkerInfo
    report: StartReport


@dataclass(frozen=True, slots=True)
class FoundLife:
    """Of a worker that another launcher has started. spec: what it serves now."""

    spec: HostSpec
    report: StartReport


async def life_of(actor: Any) -> FoundLife | None:
    """actor: a WorkerHost, or None. Returns None if it serves nothing, or does not answer."""
    if actor is None:
        return None
    try:
        found = await asyncio.wait_for(result(actor.life.remote()), _ANSWER_TIMEOUT_S)
    except (TimeoutError, ray.exceptions.RayError):
        return None
    return None if found is None else FoundLife(HostSpec.from_wire(found[0]), found[1])


class WorkerLife:
    """template: the worker's spec; each life gets an epoch of its own.

    wall_clock_ns: epochs come from it, so that they grow from one deployment to the next as well.
    """

    def __init__(
        self,
        template: HostSpec,
        cluster: RayCluster,
        router: Routers,
        reporter: Reporter,
        policy: RestartPolicy,
        wall_clock_ns: Callable[[], int] = time.time_ns,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.worker_id = template.worker_id
        self.live: LiveWorker | None = None
        self.template = template
        """Of its next life; the latency in it is what its steps were found to take."""
        # Held by whoever ends one life and begins the next.
        self._between_lives = asyncio.Lock()
        self._cluster = cluster
        self._router = router
        self._reporter = reporter
        self._policy = policy
        self._wall_clock_ns = wall_clock_ns
        self._clock = clock
        self._epoch = 0
        self._lost_since: float | None = None
        # Somebody waits for a new process in place of one that he has ended.
        self._renewed: asyncio.Future[LiveWorker] | None = None
        self._place: Place | None = None
        # A handle, which Ray types for actors of any class.
        self._actor: Any = None

    @property
    def role(self) -> worker_pb2.Role:
        """That it has, or will have when it lives again."""
        return self.template.role

    async def start(self) -> LiveWorker:
        """Begin a life, up to where the router uses it. Raises ModelError, WorkerError or RayError."""
        if self._place is None:
            self._place = await self._cluster.place(self.template)
        else:
            self._place = await self._cluster.where(self._place.group, self.template)
        if (first := self._place.first_slot) is not None:
            slots = first + self.template.num_cpus
            self.template = replace(self.template, first_slot=first, slots=slots)
        spec = self._next_spec()
        name = f"{self.worker_id}-{self._epoch}"
        self._reporter.progress(self.worker_id, "starting a process", 0.0)
        self._actor = await self._cluster.spawn(
            WorkerHost, self._place.group, name, spec.num_cpus, spec.to_wire()
        )
        report = await self._started(self._actor)
        return await self._serves(report)

    async def resume(self, left: Left, found: FoundLife | None) -> LiveWorker:
        """Go on with a worker that another launcher has left: in its place, and with its life if there is
        one. Raises like `start`."""
        self._place = Place(left.group, left.node_id, None)
        if found is None:
            if left.actor is not None:
                await self._cluster.kill(left.actor)
            return await self.start()
        self._actor, self._epoch, self.template = left.actor, found.spec.epoch, found.spec
        self._place = self._cluster.held(left.group, left.node_id, found.spec)
        return await self._serves(found.report)

    async def become(self, template: HostSpec) -> LiveWorker:
        """End this life, and begin the next one by `template` in the same process.

        What its requests were doing is lost, and they go on elsewhere: drain it before. Raises WorkerError if
        it is not up, or if the process does not manage; then it is ended, and `keep_alive` starts another one
        by `template`.
        """
        async with self._between_lives:
            live, self.live = self.live, None
            if live is None:
                raise WorkerError(f"worker {self.worker_id} is down: try again when it serves")
            self.template = template
            await self._router.lost(self.worker_id, live.info.epoch)
            try:
                report = await asyncio.wait_for(
                    result(self._actor.become.remote(self._next_spec().to_wire())), _BECOME_TIMEOUT_S
                )
                return await self._serves(report)
            except (TimeoutError, WorkerError, ray.exceptions.RayError) as error:
                await self._cluster.kill(self._actor)
                why = "it took too long" if isinstance(error, TimeoutError) else first_line(cause(error))
                raise WorkerError(
                    f"worker {self.worker_id} did not take its new role on the weights that it has loaded "
                    f"({why}): it is started anew in that role"
                ) from error

    async def renew(self, template: HostSpec) -> LiveWorker:
        """End this life's process, and wait until the next one serves, by `template`: `keep_alive` starts it.
        Drain it before. Raises WorkerError if it is not up, or if the new process does not start;
        `keep_alive` goes on trying."""
        async with self._between_lives:
            live, self.live = self.live, None
            if live is None:
                raise WorkerError(f"worker {self.worker_id} is down: try again when it serves")
            self.template = template
            await self._router.lost(self.worker_id, live.info.epoch)
            with contextlib.suppress(TimeoutError, RayActorError, RayTaskError):
                await asyncio.wait_for(self._actor.stop.remote(), _STOP_TIMEOUT_S)
            renewed: asyncio.Future[LiveWorker] = asyncio.get_running_loop().create_future()
            self._renewed = renewed
            await self._cluster.kill(self._actor)
        try:
            return await asyncio.wait_for(renewed, _RENEW_TIMEOUT_S)
        except TimeoutError:
            raise WorkerError(
                f"worker {self.worker_id} does not serve {_RENEW_TIMEOUT_S:.0f} s after its new process was "
                "to start; it is waited for"
            ) from None

    async def read_prompts(self, template: HostSpec) -> LiveWorker:
        """In the middle of a life: a decode worker is mixed from now on, or a mixed one decode, as `template`
        says. Raises WorkerError if it is not up."""
        async with self._between_lives:
            live = self.live
            if live is None:
                raise WorkerError(f"worker {self.worker_id} is down: try again when it serves")
            try:
                reads = template.role == worker_pb2.ROLE_MIXED
                await asyncio.wait_for(
                    result(self._actor.read_prompts.remote(reads=reads)), _ANSWER_TIMEOUT_S
                )
            except (TimeoutError, ray.exceptions.RayError) as error:
                why = "it does not answer" if isinstance(error, TimeoutError) else first_line(cause(error))
                raise WorkerError(f"worker {self.worker_id} did not change its role: {why}") from error
            self.template = template
            live.info.role = template.role
            await self._router.register(live.info, self.template.secret)
            return live

    async def end(self) -> None:
        """For good: the router forgets it, its process ends, and its place is free. Not beside
        `keep_alive`."""
        async with self._between_lives:
            live, self.live = self.live, None
            if live is not None:
                await self._router.forget(self.worker_id, live.info.epoch)
                with contextlib.suppress(TimeoutError, RayActorError, RayTaskError):
                    await asyncio.wait_for(self._actor.stop.remote(), _STOP_TIMEOUT_S)
            if self._actor is not None:
                await self._cluster.kill(self._actor)
            if self._place is not None:
                await self._cluster.give_back(self._place.group, self.worker_id)

    async def keep_alive(self) -> None:
        """Start the worker again whenever it dies. Ends by WorkerError only, when that does not help."""
        failures = 0
        while True:
            born = self._clock()
            reason = await self._death()
            if self._clock() - born >= self._policy.steady_s:
                failures = 0
            async with self._between_lives:
                if self._renewed is None:
                    event = f"worker {self.worker_id} (epoch {self._epoch}) died: {reason}{self._log()}"
                    self._reporter.event(event)
                failures = await self._live_again(failures, reason)

    async def _live_again(self, failures: int, reason: str) -> int:
        """Until the next life serves. failures: in a row, before; returned with those that came. reason: of
        the death. Raises WorkerError."""
        while True:
            await self._bury()
            if self._renewed is None:
                failures += 1
                if failures > self._policy.max_failures:
                    raise WorkerError(f"worker {self.worker_id} died {failures} times in a row: {reason}")
                await asyncio.sleep(self._policy.delay_s(failures))
            renewed, self._renewed = self._renewed, None
            try:
                live = await self.start()
            except ClusterError as error:
                reason = str(error)
                self._reporter.event(f"worker {self.worker_id} did not start again: {reason}")
                if renewed is not None and not renewed.done():
                    message = f"worker {self.worker_id} does not start anew: {reason}; it is tried again"
                    renewed.set_exception(WorkerError(message))
            else:
                if renewed is not None and not renewed.done():
                    renewed.set_result(live)
                self._reporter.event(
                    f"worker {self.worker_id} serves again (epoch {self._epoch}, pid {live.info.pid})"
                )
                return failures

    async def attach_again(self) -> None:
        """The router does not use this life although nobody has seen it die."""
        live = self.live
        if live is None or self._between_lives.locked():
            return
        if self._lost_since is None:
            self._lost_since = self._clock()
            self._reporter.event(f"worker {self.worker_id} (epoch {live.info.epoch}) is lost to the router")
        lost_since = self._lost_since
        error: WorkerError | None = None
        try:
            await self._router.register(live.info, self.template.secret)
        except WorkerError as refused:
            error = refused
        if self.live is not live:
            return  # the process has died meanwhile; its next life is another's business
        if error is None:
            self._lost_since = None
            self._reporter.event(f"worker {self.worker_id} (epoch {live.info.epoch}) is attached again")
        elif (lost_s := self._clock() - lost_since) >= self._policy.unresponsive_s:
            self._lost_since = None
            self._reporter.event(f"ending worker {self.worker_id}, lost for {lost_s:.0f} s: {error}")
            await self._cluster.end(self._actor, live.info.pid)

    async def stop(self) -> None:
        """Let the worker end its streams, then end its process, even if it does not answer."""
        if self._actor is None:
            return
        if self.live is not None:
            with contextlib.suppress(TimeoutError, RayActorError, RayTaskError):
                await asyncio.wait_for(self._actor.stop.remote(), _STOP_TIMEOUT_S)
        await self._cluster.kill(self._actor)

    def _next_spec(self) -> HostSpec:
        self._epoch = next_epoch(self._epoch, self._wall_clock_ns())
        return replace(self.template, epoch=self._epoch)

    async def _serves(self, report: StartReport) -> LiveWorker:
        """A life is ready: let the router use it."""
        info = worker_pb2.WorkerInfo.FromString(report.info)
        info.role = self.template.role  # in the middle of a life it may have changed
        await self._router.register(info, self.template.secret)
        self._reporter.progress(self.worker_id, "ready", 1.0)
        # Its next life need not measure its steps again, perhaps beside those that serve on while it is away.
        self.template = replace(self.template, latency=dict(info.latency))
        self.live = LiveWorker(info, report)
        return self.live

    async def _started(self, actor: Any) -> StartReport:
        """Wait for the actor's start, passing on its progress."""
        start = asyncio.ensure_future(result(actor.start.remote()))
        try:
            while not start.done():
                await asyncio.wait([start], timeout=_POLL_S)
                with contextlib.suppress(RayActorError):  # `start` says it better
                    progress: Progress = await result(actor.progress.remote())
                    self._reporter.progress(self.worker_id, progress.stage, progress.fraction)
            report: StartReport = await start
            return report
        except RayActorError as error:
            why = why_it_ended(error)
            raise WorkerError(f"worker {self.worker_id} died while starting: {why}") from error
        except EngineError as error:
            raise ModelError(f"the model cannot be served: {cause(error)}") from error
        except RayTaskError as error:
            raised = cause(error)
            raise WorkerError(
                f"worker {self.worker_id} did not start: {type(raised).__name__}: {raised}"
            ) from error
        except ray.exceptions.RayError as error:  # out of memory, say
            raise WorkerError(f"worker {self.worker_id} did not start: {first_line(error)}") from error
        finally:
            start.cancel()

    async def _death(self) -> str:
        """Wait until the process has ended; returns why, as far as Ray knows."""
        try:
            await result(self._actor.serving.remote())
        except RayActorError as error:
            return why_it_ended(error)
        except RayTaskError as error:
            return str(cause(error))
        except ray.exceptions.RayError as error:
            return first_line(error)
        raise AssertionError("WorkerHost.serving returned")

    def _log(self) -> str:
        path = self._cluster.log_of(self.live.info.pid) if self.live else None
        return f" Its log: {path}" if path else ""

    async def _bury(self) -> None:
        """Make certain that this life is over, and that the router knows."""
        live, self.live = self.live, None
        self._lost_since = None
        if live is not None:
            await self._router.lost(self.worker_id, live.info.epoch)
        await self._cluster.kill(self._actor)


def next_epoch(previous: int, now_ns: int) -> int:
    """The epoch of a life that begins at `now_ns`: milliseconds, but always greater than the one before."""
    return max(previous + 1, now_ns // 1_000_000)
