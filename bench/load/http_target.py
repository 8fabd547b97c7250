"""Any server with OpenAI's HTTP interface.

Servers differ in what they take: token ids or only text, `ignore_eos` or an error for it. So the first
request goes out in the form that says most, and if it is refused as invalid, in the next one, until one is
taken.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from bench.load.answer import Answer
from bench.load.errors import NotAServerError
from bench.load.sse import EventParser
from bench.load.target import Call, ServerInfo
from cluster.workload.jobs import Job, Status
from cluster.workload.slo import Limits

_COMMON = """
the of and to in a is that for it was on are as with his they at be this from have or by one had not but
what all were when we there can an your which their said if do will each about how up out them then she
many some so these would other into has more her two like him see time could no make than first been its
who now people my made over did down only way find use may water long little very after words called just
where most know get through back much go good new write our me man too any day same right look think also
"""
_WORDS = tuple(_COMMON.split())
_EXTRAS = {"ignore_eos": True, "stream_options": {"include_usage": True}}
_CHECK_S = 60.0
_REJECTED = 429


@dataclass(frozen=True, slots=True)
class _Form:
    """How requests are written. kind: ids, text or chat."""

    kind: str
    extras: bool

    def body(self, model: str, token_ids: Sequence[int], max_tokens: int) -> bytes:
        body: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "stream": True, "temperature": 0.0}
        if self.kind == "ids":
            body["prompt"] = list(token_ids)
        else:
            # About a token each with most tokenizers; equal ids are equal words, so prefixes stay shared.
            text = " ".join(_WORDS[token % len(_WORDS)] for token in token_ids)
            if self.kind == "text":
                body["prompt"] = text
            else:
                body["messages"] = [{"role": "user", "content": text}]
        return json.dumps(body | _EXTRAS if self.extras else body, separators=(",", ":")).encode()

    def __str__(self) -> str:
        what = {"ids": "token ids", "text": "text", "chat": "chat"}[self.kind]
        return what if self.extras else f"{what}, without ignore_eos and usage"


class HttpTarget:
    """One server; close the session that it is given."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        model: str | None,
        prompts: str,
        vocabulary: range,
        headers: Mapping[str, str],
    ) -> None:
        """url: with or without `/v1` at its end. model: None takes the first that the server lists. prompts:
        ids, text, chat, or auto for the first of ids and text that is taken."""
        self._session = session
        self._url = url.rstrip("/").removesuffix("/v1")
        self._model = model
        kinds = ("ids", "text") if prompts == "auto" else (prompts,)
        self._forms = [_Form(kind, extras) for kind in kinds for extras in (True, False)]
        self._form = self._forms[0]
        self._vocabulary = vocabulary
        self._headers = {"Content-Type": "application/json", "x-prelay-details": "1", **headers}

    async def check(self) -> ServerInfo:
        """See Target."""
        try:
            async with asyncio.timeout(_CHECK_S):
                listed = await self._listed_model()
                await self._choose_form()
        except TimeoutError as error:
            raise NotAServerError(f"{self._url} did not answer a small request in {_CHECK_S:g} s") from error
        length = listed.get("max_model_len")
        assert self._model is not None
        return ServerInfo(self._model, length if isinstance(length, int) else None, None, str(self._form))

    async def _listed_model(self) -> Mapping[str, Any]:
        url = f"{self._url}/v1/models"
        try:
            async with self._session.get(url, headers=self._headers) as response:
                body = await response.json(content_type=None) if response.status == 200 else None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise NotAServerError(f"{url} gives no OpenAI-compatible answer: {_said(error)}") from error
        listed = body.get("data") if isinstance(body, dict) else None
        models = [one for one in listed or [] if isinstance(one, dict) and isinstance(one.get("id"), str)]
        if self._model is None:
            if not models:
                raise NotAServerError(
                    f"{url} lists no model (HTTP {response.status}); is this the right URL?"
                )
            self._model = models[0]["id"]
        return next((one for one in models if one["id"] == self._model), {})

    async def _choose_form(self) -> None:
        said = ""
        tokens = [self._vocabulary[index % len(self._vocabulary)] for index in range(8)]
        for form in self._forms:
            self._form = form
            answer = Answer(Job(0.0, tokens, 4), 0.0, lambda: 0.0)
            await self.prepare(Job(0.0, tokens, 4), None)(answer)
            row = answer.row()
            # An answer that ends with its first token says nothing, but it is one.
            if row.status is Status.COMPLETE or row.error == "complete without a token":
                return
            said = row.error
            if not said.startswith(("HTTP 400", "HTTP 422")):
                break
        raise NotAServerError(f"{self._url} does not answer a small completion: {said}")

    def prepare(self, job: Job, limits: Limits | None) -> Call:
        """See Target."""
        assert self._model is not None
        path = "/v1/chat/completions" if self._form.kind == "chat" else "/v1/completions"
        headers = dict(self._headers)
        if limits is not None:
            headers["x-slo-ttft-ms"] = f"{limits.ttft_s * 1000:.3f}"
            headers["x-slo-tpot-ms"] = f"{limits.tpot_s * 1000:.3f}"
        body = self._form.body(self._model, job.prompt_token_ids, job.output_tokens)

        async def call(answer: Answer) -> None:
            try:
                await self._send(self._url + path, headers, body, answer)
            except (aiohttp.ClientError, OSError) as error:
                answer.fail(_said(error))

        return call

    async def _send(self, url: str, headers: Mapping[str, str], body: bytes, answer: Answer) -> None:
        async with self._session.post(url, data=body, headers=headers) as response:
            if response.status != 200:
                message = _message_of(_parsed(await response.read()))
                status = Status.REJECTED if response.status == _REJECTED else Status.FAILED
                answer.fail(f"HTTP {response.status}: {message}", status)
                return
            parser = EventParser()
            async for received in response.content.iter_any():
                for data in parser.feed(received):
                    _note(data, answer)


def _note(data: bytes, answer: Answer) -> None:
    """One event of a stream."""
    if data == b"[DONE]":
        return
    try:
        chunk = json.loads(data)
    except ValueError:
        answer.fail(f"an event that is not JSON: {data[:80]!r}")
        return
    try:
        _note_chunk(chunk, answer)
    except (AttributeError, KeyError, TypeError):
        answer.fail(f"an event that is no chunk of a completion: {data[:80]!r}")


def _note_chunk(chunk: Any, answer: Answer) -> None:
    if chunk.get("error") or chunk.get("object") == "error":
        answer.fail(f"error in the stream: {_message_of(chunk)}")
        return
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
            answer.tokens(1)
        if reason := choice.get("finish_reason"):
            answer.finish(reason)
    if usage := chunk.get("usage"):
        answer.usage(usage["prompt_tokens"], usage["completion_tokens"])
    if details := chunk.get("prelay"):
        answer.stages(details["stages"])


def _parsed(body: bytes) -> Any:
    """JSON, or the text that it is."""
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")


def _message_of(body: Any) -> str:
    """What an error says, in whatever form it says it."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    text = message if isinstance(message, str) else json.dumps(body)
    return " ".join(text.split())[:200] or "nothing said"


def _said(error: BaseException) -> str:
    """aiohttp's messages, which may be empty."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
