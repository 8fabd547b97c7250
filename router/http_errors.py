"""The one place that says which HTTP status and OpenAI error body an error becomes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from router import errors


@dataclass(frozen=True, slots=True)
class HttpError:
    """Status, `{"error": {...}}`, and headers to add."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


def http_error(error: Exception) -> HttpError:
    """How a client is told of `error`; one that is not a RouterError is our defect, and stays inside."""
    match error:
        case errors.PromptTooLongError():
            return _error(400, error, "invalid_request_error", error.param, "context_length_exceeded")
        case errors.SloImpossibleError():
            return _error(400, error, "invalid_request_error", error.param, "slo_impossible")
        case errors.InvalidRequestError():
            return _error(400, error, "invalid_request_error", error.param, None)
        case errors.ModelNotFoundError():
            return _error(404, error, "invalid_request_error", "model", "model_not_found")
        case errors.UnauthenticatedError():
            headers = {"WWW-Authenticate": "Bearer"}
            return _error(401, error, "authentication_error", None, "invalid_api_key", headers)
        case errors.OverloadedError():
            headers = {"Retry-After": str(math.ceil(error.retry_after_s))}
            codes = {errors.LateError: "late", errors.RateLimitedError: "rate_limited"}
            code = codes.get(type(error), "overloaded")
            return _error(429, error, "rate_limit_error", None, code, headers)
        case errors.NoWorkersError():
            return _error(503, error, "service_unavailable_error", None, "no_workers", {"Retry-After": "1"})
        case errors.NoPairError():
            return _error(503, error, "service_unavailable_error", None, "no_pair", {"Retry-After": "1"})
        case errors.WorkerLostError():
            return _error(503, error, "service_unavailable_error", None, "worker_lost")
        case errors.HandoffFailedError():
            return _error(503, error, "service_unavailable_error", None, "handoff_failed")
        case errors.StoppingError():
            return _error(503, error, "service_unavailable_error", None, "stopping")
        case errors.SlowReaderError():
            return _error(408, error, "timeout_error", None, "slow_reader")
        case errors.DeadlineExceededError():
            return _error(504, error, "timeout_error", None, "deadline_exceeded")
        case errors.RouterError():
            return _error(500, error, "server_error", None, "worker_failed")
        case _:
            return plain_error(500, "internal error of the router; its log says more", "server_error")


def plain_error(status: int, message: str, kind: str = "invalid_request_error") -> HttpError:
    """An error that is not about a request's content: a path, a method, a body that is too large."""
    return HttpError(status, {"error": {"message": message, "type": kind, "param": None, "code": None}})


def _error(
    status: int,
    error: Exception,
    kind: str,
    param: str | None,
    code: str | None,
    headers: dict[str, str] | None = None,
) -> HttpError:
    body = {"error": {"message": str(error), "type": kind, "param": param, "code": code}}
    return HttpError(status, body, headers or {})
