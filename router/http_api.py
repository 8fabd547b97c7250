"""The OpenAI-compatible HTTP front end: routes, errors, and the endpoints that are not generation."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from aiohttp import web

from router.dispatch import Dispatcher
from router.errors import InvalidRequestError, RouterError
from router.http_errors import HttpError, http_error, plain_error
from router.http_generate import GenerateApi
from router.http_request import REQUEST_ID, read_json, request_id_of, tenant_of
from router.intake import Intake
from router.openai_protocol import DetokenizeBody, TokenizeBody, parse, parse_messages
from router.openapi import openapi
from router.pool_view import PoolView, Role
from router.tenants import Tenants

_log = logging.getLogger(__name__)
_PUBLIC = frozenset({"/health", "/version", "/openapi.json"})
"""Paths that take no key."""
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpApi:
    """Everything that is served on the public HTTP port."""

    def __init__(
        self,
        intake: Intake,
        generate: GenerateApi,
        dispatcher: Dispatcher,
        pool: PoolView,
        started_at: int,
        max_body_bytes: int,
        tenants: Tenants,
    ) -> None:
        """started_at: Unix time, seconds; the model's `created`."""
        self._intake = intake
        self._generate = generate
        self._dispatcher = dispatcher
        self._pool = pool
        self._started_at = started_at
        self._max_body_bytes = max_body_bytes
        self._tenants = tenants
        self._openapi_body = json.dumps(openapi()).encode()

    def application(self) -> web.Application:
        """The aiohttp application; run it with handler_cancellation, or nobody notices clients that leave."""
        app = web.Application(client_max_size=self._max_body_bytes, middlewares=[self._errors])
        app.on_response_prepare.append(_add_request_id)
        app.add_routes(
            [
                web.post("/v1/completions", self._generate.completions),
                web.post("/v1/chat/completions", self._generate.chat),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{model:.+}", self._model),
                web.post("/tokenize", self._tokenize),
                web.post("/detokenize", self._detokenize),
                web.get("/health", self._health),
                web.get("/version", self._version),
                web.get("/openapi.json", self._openapi),
            ]
        )
        return app

    @web.middleware
    async def _errors(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Every error leaves as an OpenAI error object, the framework's own included."""
        is_readable = True
        try:
            request[REQUEST_ID] = request_id_of(request)
            if request.path not in _PUBLIC:
                tenant_of(request, self._tenants)  # before anything is read or answered
            return await handler(request)
        except web.HTTPException as raised:
            error = self._framework_error(request, raised)
        except RouterError as refused:
            error = http_error(refused)
            is_readable = not isinstance(refused.__cause__, web.RequestPayloadError)
        except Exception as defect:
            _log.exception("event=defect path=%s", request.path)
            error = http_error(defect)
        response = web.json_response(error.body, status=error.status, headers=error.headers)
        if not is_readable:
            response.force_close()  # nobody knows where the next request would begin
        return response

    def _framework_error(self, http: web.Request, raised: web.HTTPException) -> HttpError:
        match raised:
            case web.HTTPRequestEntityTooLarge():
                return plain_error(413, f"the body is larger than {self._max_body_bytes} bytes")
            case web.HTTPNotFound():
                return plain_error(
                    404, f"there is no {http.path[:200]!r} here; see /v1/models, /v1/chat/completions"
                )
            case web.HTTPMethodNotAllowed():
                allowed = ", ".join(sorted(raised.allowed_methods))
                error = plain_error(405, f"{raised.method} is not allowed here; allowed: {allowed}")
                return HttpError(error.status, error.body, {"Allow": allowed})
            case _:
                return plain_error(raised.status, raised.reason)

    async def _models(self, http: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._model_object()]})

    async def _model(self, http: web.Request) -> web.Response:
        self._intake.check_model(http.match_info["model"])
        return web.json_response(self._model_object())

    def _model_object(self) -> dict[str, Any]:
        model = self._intake.model
        return {
            "id": model.name,
            "object": "model",
            "created": self._started_at,
            "owned_by": "prelay",
            "max_model_len": model.max_model_len,
        }

    async def _tokenize(self, http: web.Request) -> web.Response:
        body = parse(TokenizeBody, await read_json(http))
        self._intake.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("give either prompt or messages", "prompt")
        if body.messages is not None:
            tokens = await self._intake.tokenize_chat(parse_messages(body.messages))
        else:
            tokens = await self._intake.tokenize(body.prompt or "")
        return web.json_response(
            {"tokens": tokens, "count": len(tokens), "max_model_len": self._intake.model.max_model_len}
        )

    async def _detokenize(self, http: web.Request) -> web.Response:
        body = parse(DetokenizeBody, await read_json(http))
        self._intake.check_model(body.model)
        return web.json_response({"prompt": await self._intake.detokenize(body.tokens, "tokens")})

    async def _health(self, http: web.Request) -> web.Response:
        workers = {role.value: len(self._pool.up(role)) for role in Role}
        healthy = self._dispatcher.serving
        return web.json_response(
            {"status": "ok" if healthy else "unavailable", "workers": workers}, status=200 if healthy else 503
        )

    async def _version(self, http: web.Request) -> web.Response:
        return web.json_response({"version": version("prelay")})

    async def _openapi(self, http: web.Request) -> web.Response:
        return web.Response(body=self._openapi_body, content_type="application/json")


async def _add_request_id(http: web.Request, response: web.StreamResponse) -> None:
    if REQUEST_ID in http:
        response.headers["x-request-id"] = http[REQUEST_ID]
