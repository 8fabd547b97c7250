"""Assembles the router: cores, shells, front ends, and the order in which they start and stop."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
from aiohttp import web
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prelay.v1 import admin_pb2_grpc
from prometheus_client import CollectorRegistry

from engine.tls import Identity, listen
from router.admin import AdminApi
from router.dispatch import Dispatcher
from router.errors import AddressTakenError
from router.estimates import Estimates
from router.grpc_api import SERVICE_NAME, InferenceApi
from router.http_api import HttpApi
from router.http_generate import GenerateApi
from router.http_server_log import HttpServerLog
from router.intake import Intake, ServedModel
from router.lengths import OutputLengths
from router.limits import Limits
from router.metrics import RouterMetrics
from router.metrics_http import metrics_application
from router.policies import POLICIES, PolicyInputs
from router.policy import Policy
from router.pool_view import PoolView
from router.prefix_index import PrefixIndex
from router.recovery import Recovery, RetryBudget
from router.settings import RouterSettings, split_address
from router.slo import SloLimits, SloPolicy, impossible_limits
from router.tenant_file import TenantFile
from router.workers import Workers

_log = logging.getLogger(__name__)

_MAX_PENDING_CALLS = 65_536


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the router listens, "host:port" with real ports."""

    http: str
    grpc: str
    metrics: str
    admin: str


class Router:
    """One router process's worth of everything; needs a running event loop."""

    def __init__(
        self,
        settings: RouterSettings,
        clock: Callable[[], float] = time.monotonic,
        policies: Mapping[str, Callable[[PolicyInputs], Policy]] = POLICIES,
        rng: random.Random | None = None,
    ) -> None:
        """rng: of placement; each router needs its own, as those side by side must not choose alike.

        Reads the tokenizer. Raises SettingsError, or engine.errors.EngineError for a bad checkpoint or
        certificates."""
        self._settings = settings
        self._internal = None if settings.internal_tls is None else Identity(settings.internal_tls)
        self._shown = (
            None
            if settings.client_tls is None
            else Identity(settings.client_tls, asks_clients=settings.client_certificates)
        )
        model = ServedModel.load(settings.model_name, Path(settings.checkpoint), settings.max_model_len)
        slo = SloPolicy(settings.slo_classes, settings.default_slo_class)
        self.registry = CollectorRegistry()
        self.pool = PoolView()
        prefixes = PrefixIndex(self.pool)
        self.lengths = OutputLengths()
        self.metrics = RouterMetrics(
            self.registry,
            settings.slo_classes,
            gated_requests=lambda: self.dispatcher.live.gated,
            prefix_blocks=lambda: len(prefixes),
            drifting=lambda: {one.trait for one in self.dispatcher.live.workload.drifts(clock())},
        )
        self._workers_changed = asyncio.Event()
        self._tenants = TenantFile(None if settings.tenants is None else Path(settings.tenants))
        self._estimates = estimates = Estimates(self.pool, prefixes, self.lengths)
        self._warned_of: set[str] = set()  # limits of classes
        inputs = PolicyInputs(
            self.pool,
            prefixes,
            estimates,
            rng or random.Random(),
            settings.max_gated_requests,
            settings.retry_after_s,
        )
        self.dispatcher = Dispatcher(
            pool=self.pool,
            prefixes=prefixes,
            lengths=self.lengths,
            estimates=estimates,
            policy=policies[settings.policy](inputs),
            recovery=Recovery(
                settings.max_attempts, RetryBudget(settings.retry_budget, settings.retry_burst)
            ),
            limits=Limits(
                settings.recovery_wait_s, settings.stream_buffer_tokens, settings.slow_reader_timeout_s
            ),
            metrics=self.metrics,
            new_detokenizer=model.tokenizer.detokenizer,
            clock=clock,
            on_change=self._workers_changed.set,
            tenants=self._tenants.tenants,
        )
        self.workers = Workers(
            router_id=uuid.uuid4().hex,
            pool=self.pool,
            dispatcher=self.dispatcher,
            metrics=self.metrics,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            suspect_after_s=settings.suspect_after_s or settings.liveness_timeout_s / 2,
            liveness_timeout_s=settings.liveness_timeout_s,
            clock=clock,
            on_change=self._workers_changed.set,
            identity=self._internal,
        )
        self._threads = ThreadPoolExecutor(settings.tokenizer_threads, thread_name_prefix="tokenizer")
        self._admin = AdminApi(self.workers, self.dispatcher.live, slo, settings.policy, clock)
        intake = Intake(
            model=model,
            executor=self._threads,
            clock=clock,
            random_seed=lambda: secrets.randbits(64),
            request_timeout_s=settings.request_timeout_s,
            largest_pool_tokens=self.pool.largest_decode_tokens,
        )
        tenants = self._tenants.tenants
        generate = GenerateApi(intake, slo, self.dispatcher.live, settings.max_choices, tenants)
        self._http = HttpApi(
            intake, generate, self.dispatcher, self.pool, int(time.time()), settings.max_body_bytes, tenants
        )
        self._inference = InferenceApi(intake, slo, self.dispatcher.live, tenants)
        self._health = health.aio.HealthServicer()
        self._running = AsyncExitStack()

    async def start(self) -> Addresses:
        """Listens everywhere. Raises AddressTakenError, and then listens nowhere."""
        settings = self._settings
        async with AsyncExitStack() as stack:
            # Undone in reverse: first nothing new comes in, then the workers are let go.
            stack.callback(self._threads.shutdown, wait=False, cancel_futures=True)
            stack.push_async_callback(self.workers.close)
            metrics = await _serve_http(
                stack, "metrics", settings.metrics, metrics_application(self.registry, self.workers)
            )
            admin_server = grpc.aio.server(options=_server_options(settings.max_body_bytes))
            admin_pb2_grpc.add_RouterAdminServicer_to_server(self._admin, admin_server)
            admin = await _serve_grpc(stack, "admin", settings.admin, admin_server, self._internal)
            public_server = grpc.aio.server(options=_server_options(settings.max_body_bytes))
            self._inference.add_to(public_server)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, public_server)
            names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, public_server)
            await self._report_health()
            public = await _serve_grpc(stack, "grpc", settings.grpc, public_server, self._shown)
            http = await _serve_http(stack, "http", settings.http, self._http.application(), self._shown)
            for background in (self.workers.keep_watch(), self._keep_health(), self._tenants.follow()):
                task = asyncio.create_task(background)
                task.add_done_callback(_report_defect)
                stack.callback(task.cancel)
            self._running = stack.pop_all()
        return Addresses(http=http, grpc=public, metrics=metrics, admin=admin)

    async def stop(self) -> None:
        """Says NOT_SERVING, ends live streams (with an error, after the grace), closes everything."""
        await self._health.enter_graceful_shutdown()
        await self.dispatcher.live.stop(self._settings.stop_grace_s)
        self.dispatcher.close()
        await self._running.aclose()

    async def _keep_health(self) -> None:
        while True:
            await self._workers_changed.wait()
            self._workers_changed.clear()
            await self._report_health()
            self._warn_of_limits()

    def _warn_of_limits(self) -> None:
        """Once of each that cannot be kept by these workers, as it was measured when they started."""
        idle = self._estimates.idle_of(1)
        if idle is None:
            return
        for field, message in impossible_limits(self._settings.slo_classes, SloLimits(*idle)).items():
            if field not in self._warned_of:
                self._warned_of.add(field)
                _log.warning("event=limit_cannot_be_kept message=%r", message)

    async def _report_health(self) -> None:
        serving = self.dispatcher.serving
        states = health_pb2.HealthCheckResponse
        for service in ("", SERVICE_NAME):
            await self._health.set(service, states.SERVING if serving else states.NOT_SERVING)


def _report_defect(task: asyncio.Task[None]) -> None:
    """Background tasks end by being cancelled; anything else must not stay unseen."""
    if not task.cancelled():
        _log.critical("event=background_task_ended", exc_info=task.exception())


def _server_options(max_body_bytes: int) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.so_reuseport", 0),  # a second router on this port must fail, not share it
        ("grpc.max_receive_message_length", max_body_bytes),
        # Calls of one burst that we have not got to yet: beyond, gRPC would cancel some by lot, without a
        # word. It is admission that refuses, and says when to come again.
        ("grpc.server.max_pending_requests", _MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING_CALLS),
    )


async def _serve_grpc(
    stack: AsyncExitStack, setting: str, address: str, server: grpc.aio.Server, identity: Identity | None
) -> str:
    host, port = split_address(setting, address)
    literal = f"[{host}]" if ":" in host else host
    try:
        bound = listen(server, f"{literal}:{port}", identity)
    except RuntimeError as error:
        raise AddressTakenError(
            setting, address, "it is in use, or not an address of this machine"
        ) from error
    stack.push_async_callback(server.stop, 0.2)
    await server.start()
    return f"{literal}:{bound}"


async def _serve_http(
    stack: AsyncExitStack,
    setting: str,
    address: str,
    app: web.Application,
    identity: Identity | None = None,
) -> str:
    host, port = split_address(setting, address)
    runner = web.AppRunner(
        app, access_log=None, logger=HttpServerLog(_log), handler_cancellation=True, shutdown_timeout=0.2
    )
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, host, port, ssl_context=None if identity is None else identity.http_context())
    try:
        await site.start()
    except (OSError, socket.gaierror) as error:
        raise AddressTakenError(setting, address, error.strerror or str(error)) from error
    bound = runner.addresses[0][1]
    return f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"
