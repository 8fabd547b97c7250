"""The official `openai` client, unchanged, against the router."""

from __future__ import annotations

from typing import Any

import openai
import pytest

PROMPT = "Once upon a time"
CHAT: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
CHAT_TEXT = "<system>Be brief.\n<user>Hello\n<assistant>"


async def test_completion(cluster):
    async with cluster.openai() as client:
        answer = await client.completions.create(model="fake", prompt=PROMPT, max_tokens=12)
    assert answer.choices[0].text == cluster.answer(PROMPT, 12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(PROMPT), "completion_tokens": 12, "total_tokens": len(PROMPT) + 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    await cluster.settled()


async def test_streamed_completion_is_the_same_text(cluster):
    async with cluster.openai() as client:
        stream = await client.completions.create(
            model="fake", prompt=PROMPT, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert len({chunk.id for chunk in chunks}) == 1
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == cluster.answer(PROMPT, 12)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12


async def test_chat(cluster):
    async with cluster.openai() as client:
        answer = await client.chat.completions.create(model="fake", messages=CHAT, max_completion_tokens=9)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == cluster.answer(CHAT_TEXT, 9)


async def test_streamed_chat_begins_with_the_role_and_ends_with_the_reason(cluster):
    async with cluster.openai() as client:
        stream = await client.chat.completions.create(
            model="fake", messages=CHAT, max_tokens=9, stream=True, stream_options={}
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == cluster.answer(CHAT_TEXT, 9)
    assert [bool(chunk.choices[0].finish_reason) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(chunk.usage is None for chunk in chunks)


async def test_chat_with_log_probabilities(cluster):
    wanted = {"model": "fake", "messages": CHAT, "max_tokens": 9, "logprobs": True, "top_logprobs": 2}
    async with cluster.openai() as client:
        answer = await client.chat.completions.create(**wanted, presence_penalty=0.5, logit_bias={"65": 1})
        stream = await client.chat.completions.create(**wanted, stream=True)
        chunks = [chunk async for chunk in stream]
    choice = answer.choices[0]
    assert "".join(one.token for one in choice.logprobs.content) == choice.message.content
    assert [one.bytes for one in choice.logprobs.content] == [[ord(one)] for one in choice.message.content]
    assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content)
    streamed = [
        one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content
    ]
    assert streamed == choice.logprobs.content


async def test_completion_with_log_probabilities(cluster):
    async with cluster.openai() as client:
        answer = await client.completions.create(
            model="fake", prompt=PROMPT, max_tokens=5, logprobs=1, echo=True, extra_body={"min_p": 0.1}
        )
    choice = answer.choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset == list(range(len(PROMPT) + 5))
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs[1:])


async def test_models(cluster):
    async with cluster.openai() as client:
        models = [model async for model in client.models.list()]
        assert [(model.id, model.model_extra["max_model_len"]) for model in models] == [("fake", 512)]
        assert (await client.models.retrieve("fake")).owned_by == "prelay"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("org/other")
