"""What a running router says of itself: asked over its admin port, and as JSON."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import grpc
from prelay.v1 import admin_pb2, admin_pb2_grpc

from cluster.errors import NoRouterError
from cluster.roles import ROLE_NAMES
from cluster.sections import parse_host_port
from engine.tls import Identity, dial_blocking

_TIMEOUT_S = 3.0
_CHANNEL_OPTIONS = (
    # Without these gRPC would wait ever longer, up to two minutes, before it dials a router again.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class StatusClient:
    """Asks one router, again and again; a router that goes away may come back. To be used in `with`."""

    def __init__(self, address: str, identity: Identity | None = None) -> None:
        self._address = address
        self._has_tls = identity is not None
        self._channel = dial_blocking(address, identity, _CHANNEL_OPTIONS)
        self._stub = admin_pb2_grpc.RouterAdminStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def fetch(self) -> admin_pb2.GetStatusResponse:
        """How it is. Raises NoRouterError."""
        try:
            status: admin_pb2.GetStatusResponse = self._stub.GetStatus(
                admin_pb2.GetStatusRequest(), timeout=_TIMEOUT_S
            )
        except grpc.RpcError as error:
            raise NoRouterError(self._reason(error)) from error
        return status

    def fetch_workload(self) -> admin_pb2.GetWorkloadResponse:
        """What has come lately. Raises NoRouterError."""
        try:
            workload: admin_pb2.GetWorkloadResponse = self._stub.GetWorkload(
                admin_pb2.GetWorkloadRequest(), timeout=_TIMEOUT_S
            )
        except grpc.RpcError as error:
            raise NoRouterError(self._reason(error)) from error
        return workload

    def _reason(self, error: grpc.RpcError) -> str:
        code, details = error.code(), str(error.details())
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"what listens at {self._address} gave no answer within {_TIMEOUT_S:.0f} s"
        if code is grpc.StatusCode.UNIMPLEMENTED or "http1" in details.lower():
            return (
                f"what listens at {self._address} is not the admin port of a router: `prelay serve` shows "
                "which that is (router.admin)"
            )
        if _listens(self._address):
            how = (
                "these certificates" if self._has_tls else "calls without TLS (--tls DIR gives certificates)"
            )
            return f"what listens at {self._address} does not take {how}, or is no router's admin port"
        return (
            f"no router answers at {self._address}: start one with `prelay serve`, or give the address that "
            "it shows as admin (--admin HOST:PORT)"
        )


def _listens(address: str) -> bool:
    host, port = parse_host_port(address)
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


def attainment(outcomes: Mapping[str, int]) -> float | None:
    """Good requests over all but those that their clients cancelled; None if there are none yet."""
    judged = sum(count for outcome, count in outcomes.items() if outcome != "cancelled")
    return outcomes.get("good", 0) / judged if judged else None


def state_of(worker: admin_pb2.WorkerStatus) -> str:
    """up, suspected (silent for a while: gets nothing new), draining (is to be empty) or down."""
    if not worker.up:
        return "down"
    if worker.draining:
        return "draining"
    return "suspected" if worker.suspected else "up"


def status_json(status: admin_pb2.GetStatusResponse) -> dict[str, Any]:
    """For programs: times in seconds, None where there is nothing to tell yet."""
    return {
        "policy": status.policy,
        "uptime_s": round(status.uptime_s, 3),
        "live_requests": status.live_requests,
        "gated_requests": status.gated_requests,
        "tokens": status.tokens,
        "outcomes": dict(status.outcomes),
        "attainment": attainment(status.outcomes),
        "classes": {
            name: {
                "ttft_limit_s": one.ttft_limit_s,
                "tpot_limit_s": one.tpot_limit_s,
                "outcomes": dict(one.outcomes),
                "attainment": attainment(one.outcomes),
            }
            for name, one in sorted(status.classes.items())
        },
        "ttft": _quantiles_json(status.ttft),
        "tpot": _quantiles_json(status.tpot),
        "workers": [_worker_json(worker) for worker in in_order(status.workers)],
    }


def in_order(workers: Any) -> list[admin_pb2.WorkerStatus]:
    """By role, and in it by name as people count: worker 2 before worker 10."""
    roles = list(ROLE_NAMES)

    def key(worker: admin_pb2.WorkerStatus) -> tuple[int, str, int, str]:
        name, _, number = worker.info.worker_id.rpartition("-")
        role = roles.index(worker.info.role) if worker.info.role in roles else len(roles)
        return role, name, int(number) if number.isdecimal() else 0, worker.info.worker_id

    return sorted(workers, key=key)


def _worker_json(worker: admin_pb2.WorkerStatus) -> dict[str, Any]:
    info, load = worker.info, worker.load
    return {
        "worker_id": info.worker_id,
        "role": ROLE_NAMES.get(info.role, "unknown"),
        "state": state_of(worker),
        "epoch": info.epoch,
        "pid": info.pid,
        "version": info.version,
        "address": info.address,
        "metrics": info.metrics_address,
        "live_requests": worker.live_requests,
        "queue_requests": load.queue_requests,
        "queue_tokens": load.queue_tokens,
        "running_requests": load.running_requests,
        "decoding_requests": load.decoding_requests,
        "decode_context": load.decode_context,
        "block_size": info.block_size,
        "kv_blocks": {
            "all": info.num_blocks,
            "free": load.free_blocks,
            "owned": load.owned_blocks,
            "leased": load.leased_blocks,
            "cached": load.cached_blocks,
        },
    }


def _quantiles_json(quantiles: admin_pb2.LatencyQuantiles) -> dict[str, float] | None:
    if not quantiles.p99_s:
        return None
    return {"p50_s": quantiles.p50_s, "p90_s": quantiles.p90_s, "p99_s": quantiles.p99_s}
