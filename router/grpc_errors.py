"""The one place that says which gRPC status an error becomes."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status.rpc_status import to_status

from router import errors

_CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (errors.InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.ModelNotFoundError, grpc.StatusCode.NOT_FOUND),
    (errors.UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
    (errors.OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.NoWorkersError, grpc.StatusCode.UNAVAILABLE),
    (errors.NoPairError, grpc.StatusCode.UNAVAILABLE),
    (errors.WorkerLostError, grpc.StatusCode.UNAVAILABLE),
    (errors.HandoffFailedError, grpc.StatusCode.UNAVAILABLE),
    (errors.StoppingError, grpc.StatusCode.UNAVAILABLE),
    (errors.SlowReaderError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.DeadlineExceededError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.WorkerUnreachableError, grpc.StatusCode.UNAVAILABLE),
    (errors.WorkerRefusedError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.RouterError, grpc.StatusCode.INTERNAL),
)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: errors.RouterError) -> None:
    """Ends the call with `error`'s status, its details as google.rpc messages; never returns."""
    code = next(code for kind, code in _CODES if isinstance(error, kind))
    details: list[Message] = []
    trailers: list[tuple[str, str | bytes]] = []
    match error:
        case errors.InvalidRequestError() if error.param is not None:
            violation = error_details_pb2.BadRequest.FieldViolation(field=error.param, description=str(error))
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        case errors.OverloadedError():
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(int(error.retry_after_s * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
            trailers.append(("grpc-retry-pushback-ms", str(int(error.retry_after_s * 1000))))
            if isinstance(error, errors.LateError):
                prediction = {"predicted_ttft_s": f"{error.ttft_s:.3f}"}
                details.append(
                    error_details_pb2.ErrorInfo(reason="LATE", domain="prelay", metadata=prediction)
                )
        case _:
            pass
    status = status_pb2.Status(code=code.value[0], message=str(error))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    trailers.extend(to_status(status).trailing_metadata)
    await context.abort(code, str(error), tuple(trailers))
