"""Log-probabilities over HTTP, in the forms that OpenAI's and vLLM's clients read; penalties on their way."""

from __future__ import annotations

import json

from engine.router_messages import sampling_of
from router.fake_model import FakeModel, fake_logprobs

PROMPT = "tell me"


async def post(http, path="/v1/completions", **body):
    body = {"model": "fake", "max_tokens": 4, **body}
    body.setdefault("messages" if "chat" in path else "prompt", PROMPT)
    if isinstance(body.get("messages"), str):
        body["messages"] = [{"role": "user", "content": body["messages"]}]
    async with http.post(path, json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def streamed(http, path="/v1/completions", **body):
    """The choices' pieces, by index of the choice."""
    body = {"model": "fake", "max_tokens": 4, "stream": True, **body}
    pieces = {}
    async with http.post(path, json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    pieces.setdefault(choice["index"], []).append(choice)
    return pieces


def joined(pieces):
    """The `logprobs` of a streamed completions choice."""
    parts = [piece["logprobs"] for piece in pieces if piece["logprobs"] is not None]
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def expected(text, first_index=0, num_top=0):
    """`logprobs` of a completions choice for an answer of single bytes."""
    scores = [fake_logprobs(ord(letter), at, num_top) for at, letter in enumerate(text, start=first_index)]
    top = [dict(zip(map(chr, one.top_ids), one.top_logprobs, strict=True)) for one in scores]
    return {
        "tokens": list(text),
        "token_logprobs": [one.logprob for one in scores],
        "top_logprobs": [
            {letter: one.logprob} | named for letter, named, one in zip(text, top, scores, strict=True)
        ],
        "text_offset": list(range(len(text))),
    }


async def test_completions_whole_and_streamed(cluster):
    answer = cluster.answer(PROMPT, 6)
    async with cluster.http() as http:
        for num_top in (0, 1, 5):
            wanted = {"max_tokens": 6, "logprobs": num_top, "n": 2}
            body = await post(http, **wanted)
            assert [one["logprobs"] for one in body["choices"]] == [expected(answer, 0, num_top)] * 2
            pieces = await streamed(http, prompt=PROMPT, **wanted)
            assert [joined(pieces[index]) for index in (0, 1)] == [expected(answer, 0, num_top)] * 2
        body = await post(http)
        assert body["choices"][0]["logprobs"] is None
        assert "prompt_logprobs" not in body["choices"][0]


async def test_an_echoed_prompt_has_its_own(cluster):
    # The second prompt has a character of two tokens, which begin where it does.
    prompts = [PROMPT, "aé!"]
    async with cluster.http() as http:
        body = await post(http, prompt=prompts, echo=True, logprobs=2)
        pieces = await streamed(http, prompt=prompts, echo=True, logprobs=2)
    plain, accented = (choice["logprobs"] for choice in body["choices"])
    whole = PROMPT + cluster.answer(PROMPT, 4)
    assert plain["tokens"] == list(whole)
    assert plain["text_offset"] == list(range(len(whole)))
    assert plain["top_logprobs"][0] is plain["token_logprobs"][0] is None
    rest = expected(PROMPT[1:], 1, 2)
    assert plain["token_logprobs"][1:7] == rest["token_logprobs"]
    assert plain["top_logprobs"][1:7] == rest["top_logprobs"]
    assert plain["token_logprobs"][7:] == expected(whole[7:], 0, 2)["token_logprobs"]
    assert accented["tokens"][:4] == ["a", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}", "!"]
    assert accented["text_offset"] == [0, 1, 1, 2, 3, 4, 5, 6]
    assert [joined(pieces[index]) for index in (0, 1)] == [plain, accented]


async def test_prompt_logprobs_are_those_that_vllm_gives(cluster):
    async with cluster.http() as http:
        body = await post(http, prompt_logprobs=1, echo=True, logprobs=3)
        chat = await post(http, "/v1/chat/completions", prompt_logprobs=0)
        other = await post(http, prompt_logprobs=2, echo=True, logprobs=0)
    assert all(len(top) == 1 for top in other["choices"][0]["logprobs"]["top_logprobs"][1:])
    assert all(len(by_id) in (2, 3) for by_id in other["choices"][0]["prompt_logprobs"][1:])
    choice = body["choices"][0]
    assert all(len(top) in (3, 4) for top in choice["logprobs"]["top_logprobs"][1:])
    assert choice["prompt_logprobs"][0] is None
    for index, (letter, by_id) in enumerate(zip(PROMPT[1:], choice["prompt_logprobs"][1:], strict=True), 1):
        wanted = fake_logprobs(ord(letter), index, 1)
        assert set(by_id) == {str(ord(letter)), *map(str, wanted.top_ids)}
        assert by_id[str(ord(letter))] == {
            "logprob": wanted.logprob, "rank": wanted.rank, "decoded_token": letter,
        }  # fmt: skip
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert all(len(by_id) == 1 for by_id in chat["prompt_logprobs"][1:])


async def test_tokens_that_a_stop_string_cuts_do_not_appear(cluster):
    whole = cluster.answer(PROMPT, 40)
    stop = whole[10:13]
    kept = whole[: whole.index(stop)]
    async with cluster.http() as http:
        body = await post(http, max_tokens=40, stop=stop, logprobs=1)
        pieces = await streamed(http, prompt=PROMPT, max_tokens=40, stop=stop, logprobs=1)
    assert body["choices"][0]["text"] == kept
    assert body["choices"][0]["logprobs"] == expected(kept, 0, 1) == joined(pieces[0])


async def test_chat_leaves_the_stop_token_out(start_cluster):
    cluster = await start_cluster(
        model=FakeModel(eos_token_id=256, answer_tokens=3, max_model_len=512, vocab_size=257)
    )
    wanted = {"logprobs": True, "top_logprobs": 2, "max_tokens": 9}
    async with cluster.http() as http:
        body = await post(http, "/v1/chat/completions", **wanted)
        messages = [{"role": "user", "content": PROMPT}]
        pieces = await streamed(http, "/v1/chat/completions", messages=messages, **wanted)
        silent = await post(http, "/v1/chat/completions", max_tokens=2, logprobs=False)
    content = body["choices"][0]["logprobs"]["content"]
    text = body["choices"][0]["message"]["content"]
    assert len(text) == 2
    for index, (letter, one) in enumerate(zip(text, content, strict=True)):
        scored = fake_logprobs(ord(letter), index, 2)
        assert (one["token"], one["bytes"], one["logprob"]) == (letter, [ord(letter)], scored.logprob)
        assert [top["bytes"] for top in one["top_logprobs"]] == [[token] for token in scored.top_ids]
        assert [top["logprob"] for top in one["top_logprobs"]] == list(scored.top_logprobs)
    parts = [piece["logprobs"]["content"] for piece in pieces[0] if piece["logprobs"]]
    assert [one for part in parts for one in part] == content
    assert silent["choices"][0]["logprobs"] is None


async def test_sampling_fields_reach_the_workers(cluster):
    async with cluster.http() as http:
        await post(
            http, min_p=0.25, presence_penalty=-0.5, frequency_penalty=1.5, repetition_penalty=1.25,
            logit_bias={"7": -100, "65": 2.5}, logprobs=5, echo=True,
        )  # fmt: skip
    wanted = sampling_of(cluster.decode.reserves[0].sampling)
    assert (wanted.min_p, wanted.presence_penalty, wanted.frequency_penalty) == (0.25, -0.5, 1.5)
    assert (wanted.repetition_penalty, wanted.logit_bias) == (1.25, ((7, -100), (65, 2.5)))
    assert (wanted.logprobs, wanted.prompt_logprobs) == (5, 5)
