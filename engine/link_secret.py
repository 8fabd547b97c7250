"""Who may dial a worker: whoever knows the secret that its launcher has given to all workers and routers of
one deployment. It travels as metadata of the call, once for each stream.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio

_KEY = "x-prelay-secret"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


def metadata_of(secret: str) -> tuple[tuple[str, str], ...]:
    """For a call to a worker; empty if there is no secret."""
    return ((_KEY, secret),) if secret else ()


class SecretInterceptor(grpc.aio.ServerInterceptor):
    """Refuses streams without the secret, before anything of them is read."""

    def __init__(self, secret: str) -> None:
        """secret: not empty."""
        self._secret = secret.encode()
        self._refusal: _Handler = grpc.stream_stream_rpc_method_handler(_refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        given = dict(handler_call_details.invocation_metadata or ()).get(_KEY, "")
        known = hmac.compare_digest(given.encode() if isinstance(given, str) else given, self._secret)
        return await continuation(handler_call_details) if known else self._refusal


async def _refuse(request_iterator: Any, context: Any) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        "this worker takes streams of its own deployment only: the secret is missing or another's",
    )
