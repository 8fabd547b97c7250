"""What all HTTP endpoints read from a request in the same way: its id, its JSON body, its SLO headers."""

from __future__ import annotations

import re
import uuid
from typing import Any

import pydantic_core
from aiohttp import web

from router.errors import InvalidRequestError
from router.slo import Slo, SloFields, SloPolicy, SloWish
from router.tenants import Tenants

REQUEST_ID = web.RequestKey("request_id", str)
"""The client's x-request-id, or one of ours."""

_SLO_HEADERS = SloFields("x-slo-class", "x-slo-ttft-ms", "x-slo-tpot-ms", "x-slo-priority")
_ALLOW_DOWNGRADE = "x-slo-allow-downgrade"

_VISIBLE = re.compile(r"[\x21-\x7e]{1,128}")


def request_id_of(http: web.Request) -> str:
    """Raises InvalidRequestError for an id that could not be sent back or logged as it is."""
    given = http.headers.get("x-request-id")
    if given is None:
        return uuid.uuid4().hex
    if _VISIBLE.fullmatch(given) is None:
        raise InvalidRequestError("x-request-id must be 1 to 128 visible ASCII characters", "x-request-id")
    return given


async def read_json(http: web.Request) -> Any:
    """The body as JSON. Raises InvalidRequestError, web.HTTPRequestEntityTooLarge."""
    try:
        body = await http.read()
    except web.RequestPayloadError as error:
        encoding = http.headers.get("Content-Encoding", "")[:40]
        raise InvalidRequestError(f"the body cannot be read (content-encoding {encoding!r})") from error
    try:
        return pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error


def tenant_of(http: web.Request, tenants: Tenants) -> str:
    """Who the request is counted for: whose key it comes with, or where none is needed who it says, if it
    does. Raises UnauthenticatedError."""
    if tenants.is_open:
        return http.headers.get("x-tenant", "")[:128]
    return tenants.who(http.headers.get("authorization"))


def slo_of(http: web.Request, policy: SloPolicy) -> Slo:
    """The SLO in the headers x-slo-class, x-slo-ttft-ms, x-slo-tpot-ms, x-slo-priority and
    x-slo-allow-downgrade. Raises InvalidRequestError."""
    wish = SloWish(
        slo_class=http.headers.get(_SLO_HEADERS.slo_class),
        ttft_s=_seconds(http, _SLO_HEADERS.ttft),
        tpot_s=_seconds(http, _SLO_HEADERS.tpot),
        priority=_whole_number(http, _SLO_HEADERS.priority),
        may_downgrade=_switch(http, _ALLOW_DOWNGRADE),
    )
    return policy.resolve(wish, _SLO_HEADERS)


def _seconds(http: web.Request, header: str) -> float | None:
    value = http.headers.get(header)
    if value is None:
        return None
    try:
        return float(value) / 1000
    except ValueError as error:
        raise InvalidRequestError(
            f"{header} must be a number of milliseconds, got {value[:40]!r}", header
        ) from error


def _whole_number(http: web.Request, header: str) -> int | None:
    value = http.headers.get(header)
    if value is None:
        return None
    try:
        return int(value)
    except ValueError as error:
        raise InvalidRequestError(f"{header} must be a whole number, got {value[:40]!r}", header) from error


def _switch(http: web.Request, header: str) -> bool:
    value = http.headers.get(header, "0")
    if value not in ("0", "1"):
        raise InvalidRequestError(f"{header} must be 1 (yes) or 0 (no), got {value[:40]!r}", header)
    return value == "1"
