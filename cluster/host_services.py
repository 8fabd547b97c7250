"""What a worker serves in each of its roles, over an engine that is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from prelay.v1 import worker_pb2

from cluster.host_engine import HostEngine
from cluster.host_spec import HostSpec

if TYPE_CHECKING:
    import grpc
    from prometheus_client import CollectorRegistry

    from engine.tls import Identity


class Service(Protocol):
    """What PrefillService and DecodeService have in common."""

    def add_to(self, server: grpc.aio.Server) -> None: ...

    async def start(self) -> None: ...

    def take_role(self, role: worker_pb2.Role) -> None:
        """Decode or mixed, instead of the other."""
        ...

    async def stop(self) -> bool: ...


def service_of(
    info: worker_pb2.WorkerInfo,
    engine: HostEngine,
    spec: HostSpec,
    registry: CollectorRegistry,
    identity: Identity | None,
    on_fatal: Callable[[BaseException], None],
) -> Service:
    """The service of the role in `info`. identity: with which it dials others. on_fatal: called in the engine
    thread when the role cannot go on."""
    backends = engine.make_backends(spec.epoch)
    if info.role == worker_pb2.ROLE_PREFILL:
        from prefill_worker.servicer import PrefillService, PrefillSettings

        reads = PrefillSettings(
            max_batch_tokens=spec.max_batch_tokens,
            heartbeat_s=spec.heartbeat_s,
            lease_s=spec.lease_s,
            digest_share=spec.digest_share,
        )
        return PrefillService(
            info, engine.runner, engine.memory, backends, registry, reads, on_fatal=on_fatal
        )
    from decode_worker.servicer import DecodeService, DecodeSettings

    writes = DecodeSettings(
        secret=spec.secret,
        identity=identity,
        max_num_seqs=spec.max_num_seqs,
        max_batch_tokens=spec.max_batch_tokens,
        heartbeat_s=spec.heartbeat_s,
        lease_s=spec.lease_s,
        digest_share=spec.digest_share,
    )
    return DecodeService(info, engine.runner, engine.memory, backends, registry, writes, on_fatal=on_fatal)
