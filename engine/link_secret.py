"""Who may dial a worker: whoever knows the secret that its launcher has given to all workers and routers of
one deployment.

Routers never get it, and no stream carries it: what they have is a digest of it and of the life that is
dialled, so whoever listens in can dial that life and no later one. It travels once, to each worker's process,
by way of Ray.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio

_KEY = "x-prelay-proof"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


def proof_of(secret: str, worker_id: str, epoch: int) -> str:
    """For that life of a worker; empty if there is no secret."""
    return _proof(secret, worker_id, epoch) if secret else ""


def metadata_of(proof: str) -> tuple[tuple[str, str], ...]:
    """For a call to the life of a worker that the proof is for; empty if there is none."""
    return ((_KEY, proof),) if proof else ()


class SecretInterceptor(grpc.aio.ServerInterceptor):
    """Refuses streams without the proof, before anything of them is read."""

    def __init__(self, secret: str, worker_id: str, epoch: int) -> None:
        """secret: not empty. worker_id, epoch: of the life that serves here."""
        self._proof = _proof(secret, worker_id, epoch).encode()
        self._refusal: _Handler = grpc.stream_stream_rpc_method_handler(_refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        given = dict(handler_call_details.invocation_metadata or ()).get(_KEY, "")
        known = hmac.compare_digest(given.encode() if isinstance(given, str) else given, self._proof)
        return await continuation(handler_call_details) if known else self._refusal


async def _refuse(request_iterator: Any, context: Any) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        "this life of the worker takes streams of its own deployment only: the proof is missing, or for "
        "another life",
    )


def _proof(secret: str, worker_id: str, epoch: int) -> str:
    return hmac.new(secret.encode(), f"{worker_id}@{epoch}".encode(), hashlib.sha256).hexdigest()
