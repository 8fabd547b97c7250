"""The router's part of a configuration: what it is told when it starts, and what is said of where it
listens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.config import ServeConfig
from cluster.router_process import RouterAddresses
from router.settings import RouterSettings
from router.slo import SloClass


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
        tenants=_path(router.tenants),
        internal_tls=_path(config.tls.internal),
        client_tls=_path(config.tls.clients),
        client_certificates=config.tls.client_certificates,
    )


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


def listening(
    config: ServeConfig, addresses: RouterAddresses | None, actors: Sequence[RouterAddresses] = ()
) -> list[tuple[str, str, str]]:
    """What there is, where, and what for. addresses: of our own router; None if it runs elsewhere. actors: of
    those that are actors."""
    if addresses is None:
        elsewhere = [
            ("router", address, "runs elsewhere; its admin port") for address in config.router.external
        ]
        return elsewhere + [line for one in actors for line in listening(config, one)]
    scheme = "http" if config.tls.clients is None else "https"
    return [
        ("HTTP", f"{scheme}://{addresses.http}", "OpenAI-compatible, under /v1"),
        ("gRPC", addresses.grpc, "prelay.v1.Inference, health, reflection"),
        ("metrics", f"http://{addresses.metrics}/metrics", "Prometheus; /targets lists the workers"),
        ("admin", addresses.admin, "prelay.v1.RouterAdmin; `prelay top` looks at it"),
    ]
