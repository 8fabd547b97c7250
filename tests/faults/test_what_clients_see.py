"""Both front ends, all that an answer can carry: a death in the middle changes nothing that is sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import defaultdict
from typing import Any

import aiohttp
import grpc.aio
import pytest
from prelay.v1 import inference_pb2, inference_pb2_grpc

from engine.tokenizer import Tokenizer
from tests.faults.harness import (
    DEADLINE_S,
    SMALL_WINDOW,
    STORYTELLER,
    Cluster,
    Nursery,
    mixed,
    sampling,
    undisturbed,
)
from tests.faults.stages import let_go

pytestmark = pytest.mark.slow

PROMPT = [11, 12, 13, 14]


class HttpStream:
    """A streamed call to /v1/completions; texts: of each choice, so far."""

    def __init__(self, cluster: Cluster, **body: Any) -> None:
        self.texts: defaultdict[int, str] = defaultdict(str)
        self.reasons: dict[int, str] = {}
        self.usage: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self._url = f"http://{cluster.addresses.http}/v1/completions"
        self._body = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0} | body
        self._news = asyncio.Condition()
        self._task = asyncio.create_task(self._read())

    async def reaches(self, num_events: int) -> None:
        async with self._news:
            await self._news.wait_for(lambda: len(self.events) >= num_events)

    async def end(self) -> None:
        await self._task

    async def _read(self) -> None:
        timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(self._url, json=self._body) as response,
        ):
            assert response.status == 200, await response.text()
            last = b""
            async for line in response.content:
                if not line.strip():
                    continue
                last = line.strip()
                if last == b"data: [DONE]":
                    break
                event = json.loads(last.removeprefix(b"data: "))
                assert "error" not in event, event
                for choice in event["choices"]:
                    self.texts[choice["index"]] += choice["text"]
                    if choice["finish_reason"]:
                        self.reasons[choice["index"]] = choice["finish_reason"]
                self.usage = event.get("usage") or self.usage
                async with self._news:
                    self.events.append(event)
                    self._news.notify_all()
            assert last == b"data: [DONE]"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(STORYTELLER)


def fields(num_tokens: int = 40, **more: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": PROMPT, "max_tokens": num_tokens, "ignore_eos": True} | more


async def struck(cluster: Cluster, stream: HttpStream, role: str) -> None:
    """With the stream under way a worker dies, and the stream ends well."""
    await stream.reaches(6)
    await cluster[f"{role}-0"].kill()
    await let_go(cluster)
    await stream.end()
    await cluster.idle()


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_several_choices_of_one_prompt(cluster: Cluster, tokenizer: Tokenizer, role: str) -> None:
    await cluster.tell("decode", "pace 0.03")
    stream = HttpStream(cluster, **fields(n=4, temperature=1.0, seed=30))
    await struck(cluster, stream, role)
    for choice in range(4):
        expected = undisturbed(PROMPT, sampling(40, temperature=1.0, seed=30 + choice))
        assert stream.texts[choice] == tokenizer.decode(expected)
    assert stream.reasons == dict.fromkeys(range(4), "length")
    assert stream.usage["prompt_tokens"] == len(PROMPT)
    assert stream.usage["completion_tokens"] == 160


async def test_a_stop_string_across_a_death(cluster: Cluster, tokenizer: Tokenizer) -> None:
    """F24: what was emitted before counts for what is looked for after."""
    answer = undisturbed(PROMPT, sampling(60))
    text = tokenizer.decode(answer)
    before, stop = tokenizer.decode(answer[:40]), tokenizer.decode(answer[:46])[-6:]
    assert stop not in before
    expected = text[: text.index(stop)]
    await cluster.tell("decode", "pace 0.03")
    stream = HttpStream(cluster, **fields(60, stop=[stop]))
    await struck(cluster, stream, "decode")
    assert stream.texts[0] == expected
    assert stream.reasons == {0: "stop"}


async def test_log_probabilities_across_a_death(cluster: Cluster) -> None:
    """As one undisturbed stream has them: of each token once, at the same place of the text."""
    whole = HttpStream(cluster, **fields(logprobs=2))
    await whole.end()
    await cluster.tell("decode", "pace 0.03")
    stream = HttpStream(cluster, **fields(logprobs=2))
    await struck(cluster, stream, "decode")

    def scored(of: HttpStream) -> dict[str, list[Any]]:
        joined: defaultdict[str, list[Any]] = defaultdict(list)
        for event in of.events:
            for choice in event["choices"]:
                for name, values in (choice["logprobs"] or {}).items():
                    joined[name] += values
        return joined

    assert scored(stream) == scored(whole)
    assert len(scored(stream)["tokens"]) == 40


async def test_a_whole_answer_across_a_death(cluster: Cluster, tokenizer: Tokenizer) -> None:
    await cluster.tell("decode", "pace 0.03")
    url = f"http://{cluster.addresses.http}/v1/completions"
    async with aiohttp.ClientSession() as session:
        call = asyncio.create_task(session.post(url, json=fields(temperature=0, logprobs=0)))
        await cluster.eventually(lambda: cluster.live_requests == 1)
        await asyncio.sleep(0.2)
        await asyncio.gather(cluster["prefill-0"].kill(), cluster["decode-0"].kill())
        async with await call as response:
            assert response.status == 200
            body = await response.json()
    expected = undisturbed(PROMPT, sampling(40))
    assert body["choices"][0]["text"] == tokenizer.decode(expected)
    assert body["usage"]["completion_tokens"] == 40
    await cluster.idle()


async def test_log_probabilities_of_the_prompt_come_once(cluster: Cluster) -> None:
    await cluster.tell("decode", "pace 0.03")
    ask = cluster.ask([*range(20, 60)], sampling(40, prompt_logprobs=1, logprobs=1))
    await ask.reaches(5)
    await asyncio.gather(cluster["prefill-0"].kill(), cluster["decode-0"].kill())
    await cluster.all_is_well(ask)
    assert next(len(message.prompt_logprobs) for message in ask.messages) == 39
    assert sum(len(message.prompt_logprobs) for message in ask.messages) == 39


async def test_a_slow_reader_is_ended_and_holds_up_nobody(nursery: Nursery) -> None:
    """F26: its decode worker is paused, and what it held is free after the limit."""
    async with Cluster(nursery, stream_buffer_tokens=16, slow_reader_timeout_s=1.0) as cluster:
        await cluster.add("prefill-0", "decode-0")
        async with grpc.aio.insecure_channel(cluster.addresses.grpc, options=SMALL_WINDOW) as channel:
            token_ids = inference_pb2.TokenIds(ids=PROMPT)
            wanted = sampling(900, logprobs=20)  # enough bytes to fill what lies between router and client
            request = inference_pb2.GenerateRequest(token_ids=token_ids, sampling=wanted)
            slow = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=DEADLINE_S)
            first = await slow.read()
            others = cluster.ask_all(mixed(20, 31))
            await asyncio.gather(*(ask.end() for ask in others))
            await cluster.eventually(lambda: cluster.live_requests == 0)
            await cluster.all_is_well(*others)
            tokens = list(first.token_ids)
            with contextlib.suppress(grpc.aio.AioRpcError):
                while (message := await slow.read()) is not grpc.aio.EOF:
                    tokens += message.token_ids
            assert await slow.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert tokens == undisturbed(PROMPT, wanted)[: len(tokens)]
            assert len(tokens) < 900


async def test_a_reader_that_was_slow_for_a_while_gets_everything(nursery: Nursery) -> None:
    """F26: paused, with its decode worker killed meanwhile, and resumed."""
    async with Cluster(nursery, stream_buffer_tokens=16) as cluster:
        await cluster.add("prefill-0", "decode-0", "decode-1")
        async with grpc.aio.insecure_channel(cluster.addresses.grpc, options=SMALL_WINDOW) as channel:
            token_ids = inference_pb2.TokenIds(ids=PROMPT)
            wanted = sampling(900, logprobs=20)
            request = inference_pb2.GenerateRequest(token_ids=token_ids, sampling=wanted)
            slow = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=DEADLINE_S)
            tokens = list((await slow.read()).token_ids)
            steps = await _steps_stop(cluster)
            assert steps < 900
            held = {worker.id: await worker.blocks_held() for worker in cluster.of("decode")}
            await cluster[max(held, key=lambda name: held[name]["owned"])].kill()
            while (message := await slow.read()) is not grpc.aio.EOF:
                tokens += message.token_ids
            assert tokens == undisturbed(PROMPT, wanted)
            await cluster.idle()


async def _steps_stop(cluster: Cluster) -> float:
    """Until the decode workers compute nothing any more; how many steps they have made."""
    last = -1.0
    async with asyncio.timeout(20):
        while True:
            samples = [await worker.samples() for worker in cluster.of("decode")]
            steps = sum(each["prelay_step_seconds_count", "decode"] for each in samples)
            if steps == last:
                return steps
            last = steps
            await asyncio.sleep(0.3)
