"""Servers with OpenAI's interface, as good and as bad as they come."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from bench.load.answer import Answer
from bench.load.connect import connect
from bench.load.errors import NotAServerError
from bench.load.http_target import _note
from bench.load.run import run_load
from cluster.workload.errors import BadInputError
from cluster.workload.jobs import Job, Row, Status
from cluster.workload.slo import Slo

SLO = Slo.fixed(60.0, 60.0)
Handler = Callable[[web.StreamResponse], Awaitable[None]]


def chunk(text: str = "", finish: str | None = None, **more: Any) -> bytes:
    body = {"choices": [{"index": 0, "text": text, "finish_reason": finish}], **more}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def delta(content: dict[str, Any], finish: str | None = None) -> bytes:
    return (
        b"data: " + json.dumps({"choices": [{"delta": content, "finish_reason": finish}]}).encode() + b"\n\n"
    )


DONE = b"data: [DONE]\n\n"
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9}}\n\n'


@dataclass
class FakeServer:
    """Answers small completions as it should, until `misbehave` is set."""

    models: Any = field(default_factory=lambda: {"data": [{"id": "fake", "max_model_len": 100}]})
    refuses: frozenset[str] = frozenset()
    """Fields that it has never heard of."""
    takes_ids: bool = True
    misbehave: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    url: str = ""

    async def list_models(self, request: web.Request) -> web.Response:
        return web.json_response(self.models)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.paths.append(request.path)
        if unknown := self.refuses & body.keys():
            return web.json_response({"error": {"message": f"unknown: {unknown}"}}, status=400)
        if isinstance(body.get("prompt"), list) and not self.takes_ids:
            return web.json_response({"detail": [{"msg": "a string is needed"}]}, status=422)
        if self.misbehave is not None:
            return await self.misbehave(request)
        return await stream(request, chunk("a"), chunk("b", "length"), DONE)


async def stream(request: web.Request, *parts: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for part in parts:
        await response.write(part)
    return response


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    app = web.Application()
    app.add_routes(
        [
            web.get("/v1/models", fake.list_models),
            web.post("/v1/completions", fake.complete),
            web.post("/v1/chat/completions", fake.complete),
        ]
    )
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield fake
    await runner.cleanup()


async def one(server: FakeServer, timeout_s: float = 60.0, **how: Any) -> Row:
    """A request, once the server has passed the check."""
    misbehave, server.misbehave = server.misbehave, None
    async with connect(server.url, **how) as target:
        await target.check()
        server.misbehave = misbehave
        rows = await run_load(target, [Job(0.0, [5, 6, 5], 9)], SLO, lambda *_: None, timeout_s=timeout_s)
    return rows[0]


def answering(*parts: bytes) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    return lambda request: stream(request, *parts)


async def cut(request: web.Request) -> web.StreamResponse:
    response = await stream(request, chunk("a"), chunk("b"))
    assert request.transport is not None
    request.transport.close()
    return response


async def test_a_complete_answer_with_usage_and_stages(server: FakeServer) -> None:
    details = {"stages": {"gate": 0.5, "decode": 1.5}}
    server.misbehave = answering(chunk("a"), chunk("b"), chunk("", "stop", prelay=details), USAGE, DONE)
    row = await one(server)
    assert (row.status, row.error) == (Status.COMPLETE, "")
    assert (row.prompt_tokens, row.output_tokens) == (3, 9)
    assert row.stages == {"gate": 0.5, "decode": 1.5}
    body = server.bodies[-1]
    assert body["prompt"] == [5, 6, 5]
    assert (body["max_tokens"], body["stream"], body["ignore_eos"]) == (9, True, True)
    assert server.headers[-1]["x-prelay-details"] == "1"


async def test_the_limits_go_along_in_headers(server: FakeServer) -> None:
    await one(server, headers={"Authorization": "Bearer x"})
    headers = server.headers[-1]
    assert (headers["x-slo-ttft-ms"], headers["x-slo-tpot-ms"]) == ("60000.000", "60000.000")
    assert headers["Authorization"] == "Bearer x"


@pytest.mark.parametrize(
    ("misbehave", "status", "error"),
    [
        (
            answering(chunk("a"), b'data: {"error": {"message": "worker lost"}}\n\n', DONE),
            Status.FAILED,
            "error in the stream: worker lost",
        ),
        (
            answering(chunk("a", "stop"), b'data: {"error": "worker lost"}\n\n', DONE),
            Status.FAILED,
            "error in the stream: worker lost",
        ),
        (
            answering(b'data: {"object": "error", "message": "too long", "code": 400}\n\n', DONE),
            Status.FAILED,
            "error in the stream: too long",
        ),
        (answering(DONE), Status.FAILED, "the stream ended without a finish reason"),
        (answering(chunk("a"), DONE), Status.FAILED, "the stream ended without a finish reason"),
        (answering(chunk("", "stop"), DONE), Status.FAILED, "complete without a token"),
        (answering(chunk("a", "abort"), DONE), Status.FAILED, "finish reason 'abort'"),
        (answering(b"data: what?\n\n"), Status.FAILED, "an event that is not JSON: b'what?'"),
        (answering(b"data: [1]\n\n"), Status.FAILED, "an event that is no chunk of a completion: b'[1]'"),
        (answering(b'data: {"choices": "x"}\n\n'), Status.FAILED, "no chunk of a completion"),
        (cut, Status.FAILED, "ClientPayloadError"),
    ],
    ids=[
        "error after 200", "error after the finish", "error as an object", "nothing", "no finish",
        "no token", "aborted", "no JSON", "no object", "no choices", "cut",
    ],
)  # fmt: skip
async def test_what_looks_like_success_and_is_none(
    server: FakeServer, misbehave: Any, status: Status, error: str
) -> None:
    server.misbehave = misbehave
    row = await one(server)
    assert row.status is status
    assert error in row.error


@pytest.mark.parametrize(
    ("code", "body", "status", "error"),
    [
        (429, '{"error": {"message": "busy,\\n come later"}}', Status.REJECTED, "HTTP 429: busy, come later"),
        (503, '{"error": {"message": "no workers"}}', Status.FAILED, "HTTP 503: no workers"),
        (400, '{"detail": "too long"}', Status.FAILED, "HTTP 400: too long"),
        (500, "oh no", Status.FAILED, "HTTP 500: oh no"),
        (502, "", Status.FAILED, "HTTP 502: nothing said"),
    ],
)
async def test_refusals(server: FakeServer, code: int, body: str, status: Status, error: str) -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.Response(status=code, text=body, headers={"Retry-After": "1"})

    server.misbehave = refuse
    row = await one(server)
    assert (row.status, row.error) == (status, error)
    assert row.ttft_s is None


def test_an_empty_chunk_is_no_first_token() -> None:
    ticks = iter([0.0, 5.0, 6.0, 7.0])
    answer = Answer(Job(0.0, [5], 9), 0.0, lambda: next(ticks))
    for event in (
        delta({"role": "assistant", "content": ""}),
        delta({"role": "assistant", "content": None}),
        chunk(""),
        delta({"content": "a"}),
        delta({"reasoning_content": "hm"}),
        delta({}, "stop"),
    ):
        _note(event.removeprefix(b"data: ").strip(), answer)
    row = answer.row()
    assert (row.status, row.ttft_s, list(row.gaps_s), row.last_s) == (Status.COMPLETE, 5.0, [1.0], 7.0)


async def test_a_chat_is_sent_as_one(server: FakeServer) -> None:
    server.misbehave = answering(delta({"role": "assistant"}), delta({"content": "a"}, "stop"), DONE)
    row = await one(server, prompts="chat")
    assert row.status is Status.COMPLETE
    assert server.paths[-1] == "/v1/chat/completions"
    (message,) = server.bodies[-1]["messages"]
    assert (message["role"], len(message["content"].split())) == ("user", 3)


async def test_a_server_that_is_too_slow_is_given_up(server: FakeServer) -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        await stream(request, chunk("a"))
        return await asyncio.Future()

    server.misbehave = slow
    row = await one(server, timeout_s=0.05)
    assert row.status is Status.TIMED_OUT


@pytest.mark.parametrize(
    ("takes_ids", "refuses", "prompts", "how"),
    [
        (True, (), "auto", "token ids"),
        (True, ("ignore_eos",), "auto", "token ids, without ignore_eos and usage"),
        (False, (), "auto", "text"),
        (False, ("stream_options",), "auto", "text, without ignore_eos and usage"),
        (True, (), "text", "text"),
        (True, ("ignore_eos",), "chat", "chat, without ignore_eos and usage"),
    ],
)
async def test_requests_take_the_form_that_the_server_takes(
    server: FakeServer, takes_ids: bool, refuses: tuple[str, ...], prompts: str, how: str
) -> None:
    server.takes_ids, server.refuses = takes_ids, frozenset(refuses)
    async with connect(server.url + "/v1/", prompts=prompts) as target:
        info = await target.check()
        rows = await run_load(target, [Job(0.0, [5, 6, 5], 9)], SLO, lambda *_: None)
    assert (info.model, info.max_model_len, info.how) == ("fake", 100, how)
    assert rows[0].status is Status.COMPLETE
    body = server.bodies[-1]
    assert not frozenset(refuses) & body.keys()
    if how.startswith("text"):
        words = body["prompt"].split()
        assert len(words) == 3
        assert words[0] == words[2] != words[1]


async def test_a_model_can_be_named(server: FakeServer) -> None:
    async with connect(server.url, model="other") as target:
        info = await target.check()
    assert (info.model, info.max_model_len) == ("other", None)
    assert server.bodies[-1]["model"] == "other"


@pytest.mark.parametrize("models", [{"data": []}, [], {"data": ["fake"]}, {"data": None}])
async def test_a_server_without_models_is_none(server: FakeServer, models: Any) -> None:
    server.models = models
    async with connect(server.url) as target:
        with pytest.raises(NotAServerError, match="lists no model"):
            await target.check()


async def test_a_server_that_refuses_everything_is_none(server: FakeServer) -> None:
    server.takes_ids, server.refuses = False, frozenset({"model"})
    async with connect(server.url) as target:
        with pytest.raises(NotAServerError, match="does not answer a small completion: HTTP 400: unknown"):
            await target.check()
    assert len(server.bodies) == 4


async def test_a_server_that_is_broken_is_asked_once(server: FakeServer) -> None:
    server.misbehave = answering(chunk("a"))
    async with connect(server.url) as target:
        with pytest.raises(NotAServerError, match="without a finish reason"):
            await target.check()
    assert len(server.bodies) == 1


@pytest.mark.parametrize("scheme", ["http", "grpc"])
async def test_nothing_listens(scheme: str) -> None:
    listener = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    listener.close()
    await listener.wait_closed()
    async with connect(f"{scheme}://127.0.0.1:{port}") as target:
        with pytest.raises(NotAServerError, match=f"127.0.0.1:{port}"):
            await target.check()


async def test_what_listens_speaks_no_http() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"220 mail\r\n")
        writer.close()

    listener = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with connect(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}") as target:
        with pytest.raises(NotAServerError, match="no OpenAI-compatible answer"):
            await target.check()
    listener.close()


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://a:1", "grpc://a", "grpc://a:1/path", "http://", "http://a:x"]
)
async def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(BadInputError, match=re.escape("give http(s)://HOST:PORT or grpc(s)://HOST:PORT")):
        async with connect(url):
            pass
