"""Sends the demo's prompts through the two front ends, as any client would: from outside."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
from google.protobuf.duration_pb2 import Duration
from prelay.v1 import inference_pb2, inference_pb2_grpc

from cluster.demo.prompts import DemoPrompt, FrontEnd
from cluster.errors import DemoError

OnText = Callable[[str], None]
"""Told each piece of an answer's text when it arrives."""

_REASONS = {inference_pb2.FINISH_REASON_STOP: "stop", inference_pb2.FINISH_REASON_LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class Served:
    """How a request was served, as the router tells. Times in seconds; the stages add up to duration_s."""

    prefill_worker: str
    decode_worker: str
    kv_bytes: int
    ttft_s: float
    tpot_s: float
    duration_s: float
    stages: Mapping[str, float]
    outcome: str


@dataclass(frozen=True, slots=True)
class Answer:
    """token_ids: None where the front end does not tell them (HTTP). finish_reason: stop or length."""

    prompt: DemoPrompt
    text: str
    token_ids: tuple[int, ...] | None
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    served: Served


class DemoClients:
    """Both front ends of one router; to be used in `async with`."""

    def __init__(self, http: str, grpc_address: str, model: str) -> None:
        self._url = f"http://{http}"
        self._model = model
        self._channel = grpc.aio.insecure_channel(grpc_address)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._session = aiohttp.ClientSession()

    async def __aenter__(self) -> DemoClients:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        await self._channel.close()

    async def ask(self, prompt: DemoPrompt, on_text: OnText) -> Answer:
        """The whole answer to one prompt. Raises DemoError if the request fails."""
        try:
            if prompt.front_end is FrontEnd.GRPC:
                return await self._ask_grpc(prompt, on_text)
            return await self._ask_http(prompt, on_text)
        except grpc.aio.AioRpcError as error:
            raise DemoError(
                f"request {prompt.number} failed: {error.code().name}: {error.details()}"
            ) from error
        except (aiohttp.ClientError, KeyError, ValueError) as error:
            raise DemoError(f"request {prompt.number} failed: {type(error).__name__}: {error}") from error

    async def _ask_grpc(self, prompt: DemoPrompt, on_text: OnText) -> Answer:
        sampling = inference_pb2.SamplingParams(max_tokens=prompt.max_tokens, temperature=0.0)
        if prompt.seed is not None:
            sampling = inference_pb2.SamplingParams(
                max_tokens=prompt.max_tokens,
                temperature=prompt.temperature,
                top_k=prompt.top_k,
                top_p=prompt.top_p,
                seed=prompt.seed,
            )
        request = inference_pb2.GenerateRequest(model=self._model, sampling=sampling)
        if prompt.chat:
            request.chat.messages.add(role="user", content=prompt.text)
        else:
            request.text = prompt.text
        text, token_ids, finish = "", [], None
        async for response in self._stub.Generate(request):
            on_text(response.text)
            text += response.text
            token_ids += response.token_ids
            if response.HasField("finish"):
                finish = response.finish
        if finish is None:
            raise DemoError(f"request {prompt.number}: the stream ended without a finish")
        details = finish.details
        return Answer(
            prompt=prompt,
            text=text,
            token_ids=tuple(token_ids),
            finish_reason=_REASONS[finish.reason],
            prompt_tokens=finish.usage.prompt_tokens,
            completion_tokens=finish.usage.completion_tokens,
            served=Served(
                prefill_worker=details.prefill_worker,
                decode_worker=details.decode_worker,
                kv_bytes=details.kv_bytes,
                ttft_s=_seconds(details.ttft),
                tpot_s=_seconds(details.tpot),
                duration_s=_seconds(details.duration),
                stages={stage: _seconds(time) for stage, time in details.stages.items()},
                outcome=details.outcome,
            ),
        )

    async def _ask_http(self, prompt: DemoPrompt, on_text: OnText) -> Answer:
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": prompt.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if prompt.seed is not None:
            body |= {
                "temperature": prompt.temperature,
                "top_k": prompt.top_k,
                "top_p": prompt.top_p,
                "seed": prompt.seed,
            }
        if prompt.chat:
            body["messages"] = [{"role": "user", "content": prompt.text}]
        else:
            body["prompt"] = prompt.text
        path = "/v1/chat/completions" if prompt.chat else "/v1/completions"
        text, reason, usage, details = "", None, None, None
        headers = {"x-prelay-details": "1"}
        async with self._session.post(self._url + path, json=body, headers=headers) as response:
            if response.status != 200:
                raise DemoError(
                    f"request {prompt.number} failed: HTTP {response.status}: {await response.text()}"
                )
            async for raw in response.content:
                line = raw.decode().strip()
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise DemoError(f"request {prompt.number} failed: {chunk['error']['message']}")
                for choice in chunk["choices"]:
                    piece = choice["delta"].get("content", "") if prompt.chat else choice["text"]
                    on_text(piece)
                    text += piece
                    reason = choice["finish_reason"] or reason
                usage = chunk.get("usage") or usage
                details = chunk.get("prelay") or details
        if reason is None or usage is None or details is None:
            raise DemoError(
                f"request {prompt.number}: the stream ended without finish reason, usage and details"
            )
        names = Served.__dataclass_fields__
        return Answer(
            prompt=prompt,
            text=text,
            token_ids=None,
            finish_reason=reason,
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            served=Served(**{name: details[name] for name in names}),
        )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
