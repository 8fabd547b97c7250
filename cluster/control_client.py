"""Asks the process that runs a deployment to change it: found through the router's admin port."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import grpc
from prelay.v1 import control_pb2, control_pb2_grpc, worker_pb2

from cluster.errors import ChangeError, ConfigError, UnknownWorkerError
from cluster.sections import parse_host_port
from cluster.status import StatusClient
from engine.tls import Identity, dial_blocking


class ControlClient:
    """For one change. Every method yields lines as things are done, and raises ChangeError (or NoRouterError,
    UnknownWorkerError, ConfigError) where it cannot go on."""

    def __init__(self, admin: str, identity: Identity | None = None) -> None:
        """admin: HOST:PORT of the router. Raises NoRouterError, or ChangeError if it knows no controller."""
        self._identity = identity
        with StatusClient(admin, identity) as client:
            self._address = client.fetch().controller
        if not self._address:
            raise ChangeError(
                f"the router at {admin} knows nobody who could change its workers: they were not started by "
                "`prelay serve`"
            )
        host, port = parse_host_port(self._address)
        if host in ("0.0.0.0", "::"):  # every address of its host, so also the one where the router was found
            self._address = f"{admin.rpartition(':')[0]}:{port}"

    def set_role(self, worker_id: str, role: worker_pb2.Role, drain_s: float) -> Iterator[str]:
        request = control_pb2.SetRoleRequest(worker_id=worker_id, role=role, drain_s=drain_s)
        return self._lines("SetRole", request)

    def drain(self, worker_id: str, drain_s: float, *, undo: bool) -> Iterator[str]:
        request = control_pb2.DrainRequest(worker_id=worker_id, drain_s=drain_s, undo=undo)
        return self._lines("Drain", request)

    def set_pools(
        self, wanted: Mapping[worker_pb2.Role, int], drain_s: float, *, dry_run: bool
    ) -> Iterator[str]:
        pools = [control_pb2.PoolSize(role=role, replicas=count) for role, count in wanted.items()]
        request = control_pb2.SetPoolsRequest(pools=pools, drain_s=drain_s, dry_run=dry_run)
        return self._lines("SetPools", request)

    def renew(self, worker_ids: Sequence[str], drain_s: float, *, dry_run: bool) -> Iterator[str]:
        request = control_pb2.RenewRequest(worker_ids=worker_ids, drain_s=drain_s, dry_run=dry_run)
        return self._lines("Renew", request)

    def _lines(self, method: str, request: object) -> Iterator[str]:
        with dial_blocking(self._address, self._identity) as channel:
            call = getattr(control_pb2_grpc.ControllerStub(channel), method)(request)
            try:
                for progress in call:
                    yield progress.line
            except grpc.RpcError as error:
                details = str(error.details())
                match error.code():
                    case grpc.StatusCode.NOT_FOUND:
                        raise UnknownWorkerError(details) from error
                    case grpc.StatusCode.FAILED_PRECONDITION | grpc.StatusCode.INVALID_ARGUMENT:
                        raise ConfigError(details) from error
                    case _:
                        raise ChangeError(details) from error
            finally:
                call.cancel()
