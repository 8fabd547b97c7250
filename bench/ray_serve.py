"""The same two pools as an application of Ray Serve, to be measured beside prelay.

    python -m bench.ray_serve --prefill 2 --decode 2 --profile deploy/bench/opt-13b-a100.json
    prelay bench serve --url http://127.0.0.1:8100 ...

Written as Serve's documentation would have it: a deployment for each phase, an ingress that calls one after
the other, requests placed by Serve's own router (power of two choices by queue length). Engines are simulated
as prelay's are: prompts are read one after the other, sequences decode in one batch, each step takes what the
profile says. Needs `ray[serve]`, which prelay does not.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.latency_profile import read_profile
from engine.latency import LatencyModel

_MODEL = "simulated"
_MAX_MODEL_LEN = 2048
_END = None


class PrefillEngine:
    """Reads one prompt after the other, in their order."""

    def __init__(self, latency: LatencyModel) -> None:
        self._latency = latency
        self._turn = asyncio.Lock()

    async def read(self, tokens: int) -> None:
        """Returns when the prompt is read, and with it the first token is there."""
        async with self._turn:
            await asyncio.sleep(self._latency.prefill_s(tokens))


@dataclass(slots=True)
class _Sequence:
    context: int
    left: int
    out: asyncio.Queue[int | None] = field(default_factory=asyncio.Queue)


class DecodeEngine:
    """A batch that sequences join between two steps, in their order, while there is room for all of them to
    their ends."""

    def __init__(self, latency: LatencyModel, kv_cache_tokens: int, max_num_seqs: int) -> None:
        self._latency = latency
        self._kv_cache_tokens = kv_cache_tokens
        self._max_num_seqs = max_num_seqs
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._task: asyncio.Task[None] | None = None
        self.steps = 0
        """That it has taken so far."""

    async def write(self, context: int, count: int) -> AsyncIterator[int]:
        """So many tokens more, after `context` of them."""
        sequence = _Sequence(context, count)
        self._waiting.append(sequence)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        while (token := await sequence.out.get()) is not _END:
            yield token

    async def _run(self) -> None:
        due = time.monotonic()
        while self._waiting or self._running:
            self._admit()
            context = sum(one.context for one in self._running)
            due = max(due, time.monotonic() - 0.01) + self._latency.decode_s(len(self._running), context)
            await asyncio.sleep(due - time.monotonic())
            self.steps += 1
            for one in self._running:
                one.context, one.left = one.context + 1, one.left - 1
                one.out.put_nowait(1)
                if not one.left:
                    one.out.put_nowait(_END)
            self._running = [one for one in self._running if one.left]

    def _admit(self) -> None:
        taken = sum(one.context + one.left for one in self._running)
        while self._waiting and len(self._running) < self._max_num_seqs:
            first = self._waiting[0]
            if self._running and taken + first.context + first.left > self._kv_cache_tokens:
                return
            taken += first.context + first.left
            self._running.append(self._waiting.popleft())


def application(
    latency: LatencyModel, prefill: int, decode: int, kv_cache_tokens: int, max_num_seqs: int
) -> Any:
    """What `serve.run` takes."""
    from ray import serve

    # What waits, waits in the engines: at a limit of Serve's own its router would ask again and again.
    deployment: Any = partial(
        serve.deployment, max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 0}
    )
    readers = deployment(num_replicas=prefill)(Prefill).bind(latency)
    writers = deployment(num_replicas=decode)(Decode).bind(latency, kv_cache_tokens, max_num_seqs)
    return deployment(num_replicas=1)(Ingress).bind(readers, writers)


class Prefill:
    """A replica."""

    def __init__(self, latency: LatencyModel) -> None:
        self._engine = PrefillEngine(latency)

    async def read(self, tokens: int) -> None:
        await self._engine.read(tokens)


class Decode:
    """A replica."""

    def __init__(self, latency: LatencyModel, kv_cache_tokens: int, max_num_seqs: int) -> None:
        self._engine = DecodeEngine(latency, kv_cache_tokens, max_num_seqs)

    async def write(self, context: int, count: int) -> AsyncIterator[int]:
        async for token in self._engine.write(context, count):
            yield token


class Ingress:
    """The replica that has the HTTP endpoints."""

    def __init__(self, readers: Any, writers: Any) -> None:
        self._readers = readers
        self._writers = writers.options(stream=True)

    async def __call__(self, request: Any) -> Any:
        responses: Any = importlib.import_module("starlette.responses")  # comes with ray[serve]
        if request.url.path == "/v1/models":
            return responses.JSONResponse(
                {"object": "list", "data": [{"id": _MODEL, "max_model_len": _MAX_MODEL_LEN}]}
            )
        if request.url.path != "/v1/completions":
            return responses.JSONResponse({"error": {"message": "there is only /v1/completions"}}, 404)
        body = await request.json()
        prompt = body["prompt"]
        tokens = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
        answer = self._answer(tokens, int(body.get("max_tokens", 16)))
        return responses.StreamingResponse(answer, media_type="text/event-stream")

    async def _answer(self, tokens: int, count: int) -> AsyncIterator[str]:
        await self._readers.read.remote(tokens)
        yield _event("a", "length" if count == 1 else None)
        written = 1
        if count > 1:
            async for _ in self._writers.write.remote(tokens + 1, count - 1):
                written += 1
                yield _event("a", "length" if written == count else None)
        usage = {"prompt_tokens": tokens, "completion_tokens": written, "total_tokens": tokens + written}
        yield f"data: {json.dumps({'model': _MODEL, 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


def _event(text: str, finish: str | None) -> str:
    choice = {"index": 0, "text": text, "finish_reason": finish}
    chunk = {"id": "x", "object": "text_completion", "created": 0, "model": _MODEL, "choices": [choice]}
    return f"data: {json.dumps(chunk)}\n\n"


def _at_least_one(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{count} is less than 1")
    return count


def main() -> None:
    """Serves until Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ray_serve", description="Two simulated pools as an application of Ray Serve."
    )
    parser.add_argument("--prefill", type=_at_least_one, default=2, help="replicas")
    parser.add_argument("--decode", type=_at_least_one, default=2, help="replicas")
    parser.add_argument("--profile", type=Path, required=True, help="of `prelay profile --json`")
    parser.add_argument("--kv-cache-tokens", type=int, default=66144, help="of a decode replica")
    parser.add_argument("--max-num-seqs", type=int, default=128, help="of a decode replica")
    parser.add_argument("--port", type=int, default=8100, help="on 127.0.0.1")
    asked = parser.parse_args()
    try:
        latency = read_profile(asked.profile)
        from ray import serve
    except ConfigError as error:
        parser.error(str(error).replace("model.profile", "--profile"))
    except ImportError:
        parser.exit(2, f"{parser.prog}: error: it needs pip install 'ray[serve]=={version('ray')}'\n")
    serve.start(http_options={"host": "127.0.0.1", "port": asked.port})
    serve.run(
        application(latency, asked.prefill, asked.decode, asked.kv_cache_tokens, asked.max_num_seqs),
        blocking=True,
    )


if __name__ == "__main__":
    main()
