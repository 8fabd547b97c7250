"""A deployment: the router, Ray, and the workers of all pools; started in that order, watched, and stopped.

The router comes first because it takes the public ports, and a port in use must be known at once. Stopping
goes the same way: first the router, which ends its clients' streams with a clear error, then the workers,
then Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prelay.v1 import worker_pb2

from cluster.config import ServeConfig
from cluster.errors import ClusterError, WorkerError
from cluster.host import DecodeHost, MixedHost, PrefillHost, WorkerHost
from cluster.host_spec import HostSpec
from cluster.latency_profile import read_profile
from cluster.ray_cluster import RayCluster
from cluster.reporter import Reporter
from cluster.router_process import RouterAddresses, RouterProcess
from cluster.worker_life import LiveWorker, RestartPolicy, WorkerLife
from router.settings import RouterSettings
from router.slo import SloClass

T = TypeVar("T")

_BEATS_PER_TIMEOUT = 6
"""Snapshots that may be lost or late before a worker counts as dead."""

_ATTACH_BEAT_S = 1.0
"""How often the router is asked whether it has lost a worker."""


@dataclass(frozen=True, slots=True)
class Ready:
    """What listens where, once everything does."""

    config: ServeConfig
    addresses: RouterAddresses
    router_pid: int
    workers: tuple[LiveWorker, ...]
    startup_s: float


class Deployment:
    """config: resolved, with max_model_len filled in. run_directory: for Ray's files. on_router_log: told
    what the router logs, from router_log_level on.
    """

    def __init__(
        self,
        config: ServeConfig,
        run_directory: Path,
        reporter: Reporter,
        on_router_log: Callable[[str], None],
        router_log_level: str = "WARNING",
    ) -> None:
        self._router_log_level = router_log_level
        self._config = config
        self._reporter = reporter
        self._on_router_log = on_router_log
        self._cluster = RayCluster(config.ray.address, config.num_cpus, run_directory)
        self._router: RouterProcess | None = None
        self._lives: list[WorkerLife] = []

    async def start(self) -> Ready:
        """Start everything. Raises a ClusterError that says what could not be started; `stop` even then."""
        begin = time.monotonic()
        self._reporter.progress("router", "starting", None)
        settings = router_settings(self._config, self._router_log_level)
        router = self._router = await RouterProcess.start(settings.to_json(), self._on_router_log)
        self._reporter.progress("router", "ready", 1.0)
        workers = await _unless_it_fails(_end_of(router), self._start_workers(router))
        return Ready(self._config, router.addresses, router.pid, workers, time.monotonic() - begin)

    async def run(self) -> None:
        """Keep the workers alive. Ends by a ClusterError only: no router, or no workers left that can serve
        together."""
        assert self._router is not None
        tasks = {asyncio.create_task(life.keep_alive()): life for life in self._lives}
        try:
            watches = _end_of(self._router), _end_of(self._cluster), self._keep_attached(self._router)
            await _unless_it_fails(_all(*watches), self._watch(tasks))
        finally:
            await _cancel(tasks)

    async def run_while(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, with the deployment kept running until then. Raises like both."""
        return await _unless_it_fails(self.run(), work)

    async def stop(self) -> None:
        """Stop everything that was started, however far `start` came."""
        if self._router is not None:
            await self._router.stop()
        await asyncio.gather(*(life.stop() for life in self._lives))
        await self._cluster.stop()

    async def _start_workers(self, router: RouterProcess) -> tuple[LiveWorker, ...]:
        where = self._config.ray.address
        self._reporter.progress("ray", f"joining {where}" if where else "starting", None)
        await self._cluster.start()
        self._reporter.progress("ray", "ready", 1.0)
        policy = RestartPolicy()
        self._lives = [
            WorkerLife(host_class, spec, self._cluster, router, self._reporter, policy)
            for host_class, spec in worker_specs(self._config)
        ]
        workers = await _all(*(life.start() for life in self._lives))
        if any(worker.report.cores_shared for worker in workers):
            self._reporter.event(
                f"warning: the workers have {self._config.num_cpus} threads together, more than there are "
                "cores: some share a core, and their timings will suffer"
            )
        return tuple(workers)

    async def _keep_attached(self, router: RouterProcess) -> None:
        """Attach workers again that the router has given up; runs for ever."""
        while True:
            await asyncio.sleep(_ATTACH_BEAT_S)
            with contextlib.suppress(WorkerError):  # a router that has ended is seen elsewhere
                attached = await router.attached()
                lost = [
                    life
                    for life in self._lives
                    if life.live is not None and (life.worker_id, life.live.info.epoch) not in attached
                ]
                await asyncio.gather(*(life.attach_again() for life in lost))

    async def _watch(self, tasks: dict[asyncio.Task[None], WorkerLife]) -> None:
        """Wait until so many workers are lost for good that the others cannot serve."""
        left = dict(tasks)
        while True:
            done, _ = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                left.pop(task)
                error = task.exception()
                if not isinstance(error, ClusterError):
                    task.result()
                if not can_serve({life.role for life in left.values()}):
                    raise WorkerError(f"{error}; {_who_is_left(left.values())}") from error
                self._reporter.event(f"{error}; going on without it")


def router_settings(config: ServeConfig, log_level: str) -> RouterSettings:
    """The router's part of a resolved configuration."""
    router = config.router
    return RouterSettings(
        checkpoint=str(config.model.path),
        model_name=str(config.model.name),
        max_model_len=config.model.max_model_len,
        http=router.http,
        grpc=router.grpc,
        metrics=router.metrics,
        admin=router.admin,
        slo_classes={
            name: SloClass(slo.ttft_s, slo.tpot_s, slo.priority, slo.downgrade_to)
            for name, slo in config.slo.classes.items()
        },
        default_slo_class=config.slo.default,
        policy=router.policy,
        suspect_after_s=router.suspect_after_s,
        liveness_timeout_s=router.liveness_timeout_s,
        max_attempts=router.max_attempts,
        retry_budget=router.retry_budget,
        retry_burst=router.retry_burst,
        recovery_wait_s=router.recovery_wait_s,
        stream_buffer_tokens=router.stream_buffer_tokens,
        slow_reader_timeout_s=router.slow_reader_timeout_s,
        max_body_bytes=router.max_body_bytes,
        max_choices=router.max_choices,
        max_gated_requests=router.max_gated_requests,
        retry_after_s=router.retry_after_s,
        request_timeout_s=router.request_timeout_s,
        log_level=log_level,
    )


def worker_specs(config: ServeConfig) -> list[tuple[type[WorkerHost], HostSpec]]:
    """Every worker of a checked configuration, pool by pool, with the slots of cores in that order.

    Raises ConfigError if model.profile cannot be used.
    """
    model, block_size = config.model, config.kv.block_size
    assert model.path is not None
    assert model.name is not None
    assert model.max_model_len is not None
    specs: list[tuple[type[WorkerHost], HostSpec]] = []
    latency = {} if model.profile is None else dict(read_profile(model.profile).coefficients)
    slot = 0
    for host_class, pool, role, max_num_seqs in (
        (PrefillHost, config.prefill, "prefill", 0),
        (DecodeHost, config.decode, "decode", config.decode.max_num_seqs),
        (MixedHost, config.mixed, "mixed", config.mixed.max_num_seqs),
    ):
        for index in range(pool.replicas):
            assert pool.kv_cache_tokens is not None
            spec = HostSpec(
                worker_id=f"{role}-{index}",
                epoch=0,
                checkpoint=model.path,
                model_name=model.name,
                max_model_len=model.max_model_len,
                dtype=model.dtype,
                load=model.load,
                block_size=block_size,
                num_blocks=-(-pool.kv_cache_tokens // block_size),
                tp_size=pool.tensor_parallel,
                pp_size=pool.pipeline_parallel,
                threads=pool.threads,
                first_slot=slot,
                slots=config.num_cpus,
                max_batch_tokens=pool.max_batch_tokens,
                max_num_seqs=max_num_seqs,
                heartbeat_s=config.router.liveness_timeout_s / _BEATS_PER_TIMEOUT,
                lease_s=config.transfer.lease_s,
                digest_share=config.transfer.digest_share,
                backend=config.transfer.backend,
                latency=latency,
            )
            specs.append((host_class, spec))
            slot += spec.num_cpus
    return specs


def can_serve(roles: Set[worker_pb2.Role]) -> bool:
    """Whether workers of these roles can read prompts and write answers together."""
    return worker_pb2.ROLE_MIXED in roles or {worker_pb2.ROLE_PREFILL, worker_pb2.ROLE_DECODE} <= roles


def _who_is_left(lives: Iterable[WorkerLife]) -> str:
    names = ", ".join(life.worker_id for life in lives)
    return f"{names} cannot serve without it" if names else "it was the last worker"


async def _end_of(part: RouterProcess | RayCluster) -> None:
    """Raises the error that says so when `part` has ended."""
    raise await part.ended()


async def _unless_it_fails(watch: Coroutine[Any, Any, object], work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, unless `watch`, which only ends by raising, ends first: then its error."""
    tasks = asyncio.create_task(work), asyncio.create_task(watch)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            tasks[1].result()
        return await tasks[0]
    finally:
        await _cancel(tasks)


async def _all(*work: Coroutine[Any, Any, T]) -> list[T]:
    """All results in order; when one fails, the others are cancelled and its error is raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
