"""POST /v1/completions and /v1/chat/completions: from the body to the last byte of the answer.

1. The body is parsed, the prompts are tokenised, and one request for each choice is submitted. Whatever is
   wrong by then has an HTTP status of its own.
2. A stream begins with its first delta, so an error before the first token has an HTTP status, too, and a
   client can repeat the call. From then on an error is `data: {"error": ...}`, and `[DONE]` ends every
   stream.
3. A client that goes away cancels the handler, and leaving the answers' streams cancels the requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from router.answer_stream import AnswerStream
from router.errors import InvalidRequestError, RouterError
from router.event_writer import EventWriter
from router.http_errors import http_error
from router.http_request import REQUEST_ID, read_json, slo_of, tenant_of
from router.intake import Intake
from router.live_requests import LiveRequests
from router.openai_fields import FieldWatch
from router.openai_logprobs import (
    Echo,
    chat_logprobs,
    completion_logprobs,
    echoed_logprobs,
    prompt_logprobs,
    with_top,
)
from router.openai_protocol import ChatBody, CompletionBody, Prompt, parse, parse_messages, parse_prompts
from router.openai_responses import Part, Reply, event, usage_of
from router.requests import Delta, Finish, Request
from router.sampling import SamplingWish
from router.slo import SloPolicy
from router.tenants import Tenants

_DONE = b"data: [DONE]\n\n"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Job:
    """A parsed call: one request for each choice, the `count` of one prompt side by side.

    echo: of each choice, what stands before its answer. prompt_logprobs: how many the choices carry for each
    token of the prompt.
    """

    requests: Sequence[Request]
    count: int
    echo: Sequence[Echo | None]
    prompt_logprobs: int | None
    stream: bool
    include_usage: bool

    @property
    def is_plain(self) -> bool:
        """Whether the pieces of its answers are text, and nothing beside it."""
        return self.prompt_logprobs is None and self.requests[0].sampling.logprobs is None

    def usage(self, finishes: Sequence[Finish]) -> dict[str, Any]:
        """finishes: of all choices in order. Each prompt counts once, as cached as all its choices saw it."""
        prompts = [finishes[at : at + self.count] for at in range(0, len(finishes), self.count)]
        return usage_of(
            prompt_tokens=sum(choices[0].prompt_tokens for choices in prompts),
            completion_tokens=sum(finish.completion_tokens for finish in finishes),
            cached_tokens=sum(min(finish.cached_tokens for finish in choices) for choices in prompts),
        )


class GenerateApi:
    """The two endpoints."""

    def __init__(
        self,
        intake: Intake,
        slo: SloPolicy,
        live: LiveRequests,
        max_choices: int,
        tenants: Tenants,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """max_choices: answers that one call may ask for (prompts times n)."""
        self._tenants = tenants
        self._intake = intake
        self._slo = slo
        self._live = live
        self._max_choices = max_choices
        self._wall_clock = wall_clock
        self._watch = FieldWatch()

    async def completions(self, http: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        arrived_at = self._intake.now()
        body = parse(CompletionBody, await read_json(http), self._watch)
        self._intake.check_model(body.model)
        prompts = parse_prompts(body.prompt)
        count = self._choices(len(prompts), body.n)
        token_ids = [await self._token_ids(prompt) for prompt in prompts]
        requests = self._requests(http, token_ids, body.wish(), count, arrived_at)
        echo: list[Echo | None] = [None] * len(prompts)
        if body.echo:
            scored = body.logprobs is not None
            each = zip(prompts, token_ids, strict=True)
            echo = [await self._echo(prompt, ids, scored) for prompt, ids in each]
        job = _Job(
            requests=requests,
            count=count,
            echo=[one for one in echo for _ in range(count)],
            prompt_logprobs=body.prompt_logprobs,
            stream=bool(body.stream),
            include_usage=body.include_usage,
        )
        return await self._answer(http, job, chat=False)

    async def chat(self, http: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        arrived_at = self._intake.now()
        body = parse(ChatBody, await read_json(http), self._watch)
        self._intake.check_model(body.model)
        messages = parse_messages(body.messages)
        count = self._choices(1, body.n)
        token_ids = await self._intake.tokenize_chat(messages)
        job = _Job(
            requests=self._requests(http, [token_ids], body.wish(), count, arrived_at),
            count=count,
            echo=[None] * count,
            prompt_logprobs=body.prompt_logprobs,
            stream=bool(body.stream),
            include_usage=body.include_usage,
        )
        return await self._answer(http, job, chat=True)

    def _choices(self, num_prompts: int, n: int | None) -> int:
        count = 1 if n is None else n
        if count < 1:
            raise InvalidRequestError(f"n must be at least 1, got {n}", "n")
        if num_prompts * count > self._max_choices:
            param = "n" if num_prompts == 1 else "prompt"
            raise InvalidRequestError(
                f"{num_prompts} prompts with n={count} are {num_prompts * count} answers; one call may ask "
                f"for at most {self._max_choices}",
                param,
            )
        return count

    async def _token_ids(self, prompt: Prompt) -> Sequence[int]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        return await self._intake.tokenize_prompt(prompt.text or "")

    async def _echo(self, prompt: Prompt, token_ids: Sequence[int], scored: bool) -> Echo:
        text = prompt.text
        if text is None:
            text = await self._intake.detokenize(token_ids, "prompt")
        return Echo(text, token_ids, await self._intake.token_starts(token_ids) if scored else ())

    def _requests(
        self,
        http: web.Request,
        token_ids: Sequence[Sequence[int]],
        wish: SamplingWish,
        count: int,
        arrived_at: float,
    ) -> list[Request]:
        slo, tenant = slo_of(http, self._slo), tenant_of(http, self._tenants)
        return [
            self._intake.request(
                ids,
                wish.for_choice(index),
                slo,
                request_id=http[REQUEST_ID],
                tenant=tenant,
                arrived_at=arrived_at,
            )
            for ids in token_ids
            for index in range(count)
        ]

    async def _answer(self, http: web.Request, job: _Job, *, chat: bool) -> web.StreamResponse:
        prefix = "chatcmpl" if chat else "cmpl"
        reply = Reply(f"{prefix}-{http[REQUEST_ID]}", self._intake.model.name, int(self._wall_clock()), chat)
        details = http.headers.get("x-prelay-details", "") == "1"
        async with AsyncExitStack() as stack:
            submitted = self._live.submit_all(job.requests, paced=job.stream)
            answers = [await stack.enter_async_context(answer) for answer in submitted]
            if job.stream:
                return await self._stream(http, job, reply, answers, details)
            return await self._whole(job, reply, answers, details)

    async def _whole(
        self, job: _Job, reply: Reply, answers: Sequence[AnswerStream], details: bool
    ) -> web.StreamResponse:
        deltas_of: list[list[Delta]] = [[] for _ in answers]
        async with aclosing(_merge(answers)) as deltas:
            async for index, delta in deltas:
                deltas_of[index].append(delta)
        wholes = [Delta.joined(each) for each in deltas_of]
        parts = [self._part(job, reply, index, delta, first=True) for index, delta in enumerate(wholes)]
        usage = job.usage([part.finish for part in parts if part.finish is not None])
        return web.json_response(reply.whole(parts, usage, details))

    def _part(self, job: _Job, reply: Reply, index: int, delta: Delta, *, first: bool) -> Part:
        """A piece of a choice, or all of it. first: it begins the choice, so an echoed prompt is in it."""
        tokenizer, echo = self._intake.model.tokenizer, job.echo[index]
        count = job.requests[index].sampling.logprobs
        logprobs: dict[str, Any] | None = None
        of_prompt: list[Any] | None = None
        if count is not None and (delta.scored or first):
            if reply.chat:
                logprobs = chat_logprobs(delta.scored, tokenizer)
            elif echo is not None and first:
                prompt = with_top(delta.prompt_logprobs, count)
                logprobs = echoed_logprobs(echo, prompt, delta.scored, tokenizer)
            else:
                logprobs = completion_logprobs(delta.scored, tokenizer, len(echo.text) if echo else 0)
        if job.prompt_logprobs is not None:
            of_prompt = prompt_logprobs(with_top(delta.prompt_logprobs, job.prompt_logprobs), tokenizer)
        text = echo.text + delta.text if echo is not None and first else delta.text
        return Part(text, delta.finish, logprobs, of_prompt)

    def _events(
        self,
        job: _Job,
        reply: Reply,
        index: int,
        delta: Delta,
        begun: set[int],
        finishes: dict[int, Finish],
        details: bool,
    ) -> bytes:
        """What a piece of a choice says to a streaming client; nothing, if its text is still held back."""
        first = index not in begun
        if not first and delta.finish is None and not delta.scored and job.is_plain:
            return reply.text_event(index, delta.text) if delta.text else b""
        begun.add(index)
        part = self._part(job, reply, index, delta, first=first)
        chunks = [reply.role_chunk(index)] if reply.chat and first else []
        if part.text or part.finish is not None:
            chunks.append(reply.part_chunk(index, part, details))
        if part.finish is not None:
            finishes[index] = part.finish
        return b"".join(map(event, chunks))

    async def _stream(
        self, http: web.Request, job: _Job, reply: Reply, answers: Sequence[AnswerStream], details: bool
    ) -> web.StreamResponse:
        async with aclosing(_merge(answers)) as deltas:
            first = await anext(deltas)
            response = web.StreamResponse(
                headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
            )
            begun: set[int] = set()
            finishes: dict[int, Finish] = {}
            writer = EventWriter(response)

            def write_text(delta: Delta) -> bool:
                return writer.write(reply.text_event(0, delta.text) if delta.text else b"")

            try:
                await response.prepare(http)
                index, delta = first
                while True:
                    if events := self._events(job, reply, index, delta, begun, finishes, details):
                        await response.write(events)
                    if len(finishes) == len(answers):
                        break
                    if len(answers) == 1 and job.is_plain:
                        await answers[0].push(write_text)
                        await writer.finish()
                    index, delta = await anext(deltas)
                if job.include_usage:
                    usage = job.usage([finishes[index] for index in range(len(answers))])
                    await response.write(event(reply.usage_chunk(usage)))
                await response.write(_DONE)
            except ConnectionError:
                pass  # the client is gone, and with it whoever could be told
            except Exception as error:
                if not isinstance(error, RouterError):
                    _log.exception("event=defect request=%s", http[REQUEST_ID])
                with contextlib.suppress(ConnectionError):
                    await response.write(event(http_error(error).body) + _DONE)
        return response


async def _merge(answers: Sequence[AnswerStream]) -> AsyncGenerator[tuple[int, Delta], None]:
    """The deltas of several answers with their index, as they come; the first error ends all.

    Each answer has at most one delta under way, so that what a slow client does not take is merged where it
    waits.
    """
    if len(answers) == 1:  # nearly always, and without tasks it costs half
        async for delta in answers[0]:
            yield 0, delta
        return
    waiting = {asyncio.ensure_future(anext(answer)): index for index, answer in enumerate(answers)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in sorted(done, key=waiting.__getitem__):
                index = waiting.pop(future)
                delta = future.result()
                if delta.finish is None:
                    waiting[asyncio.ensure_future(anext(answers[index]))] = index
                yield index, delta
    finally:
        for future in waiting:
            if not future.cancel() and not future.cancelled():
                future.exception()  # failed together with the one that ended all: nobody else asks for it
