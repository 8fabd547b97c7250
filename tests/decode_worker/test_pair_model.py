"""A pair that runs a real model: its answers are those of one engine in one process."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
import torch
from prelay.v1 import worker_pb2
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig
from engine.engine import Engine
from engine.generate import generate
from engine.sequence import RequestKey, TokenSampling

VOCAB_SIZE = 160


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random Llama; wide initialisation, so that answers depend on every token."""
    path = tmp_path_factory.mktemp("checkpoint")
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        LlamaForCausalLM(config).save_pretrained(path)
    return path


async def next_snapshot(stream):
    seen = stream.snapshot.seq
    await stream.snapshot_when(lambda now: now.seq > seen)


async def test_answers_are_those_of_one_engine(pair, make_router, checkpoint):
    config = EngineConfig(num_blocks=128, block_size=8, max_batch_tokens=24, dtype="float32", threads=1)
    alone = Engine.load(checkpoint, config, None, lambda fraction: None)
    pair.num_blocks, pair.layout, pair.max_batch_tokens, pair.backend = 128, alone.layout, 24, "ipc"
    pair.load = lambda segment: (
        Engine.load(checkpoint, config, segment.data_buffer, lambda fraction: None).runner
    )
    prefill = await pair.prefill()
    decode = await pair.decode()
    router = await make_router(prefill, decode)
    rng = random.Random(3)

    async def ask(number):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 60))]
        stops = frozenset(rng.sample(range(VOCAB_SIZE), 3))
        wanted = TokenSampling(0.0 if number % 2 else 0.9, 0, 1.0, number, rng.randint(1, 30), 0, stops)
        answer = await router.submit(RequestKey(f"r{number}", 0), prompt, wanted)
        await answer.done.wait()
        assert answer.failed is None
        return prompt, wanted, answer.token_ids

    for prompt, wanted, token_ids in await asyncio.gather(*(ask(number) for number in range(10))):
        assert token_ids == generate(alone, prompt, wanted)
    for snapshot in (await router.prefill.idle(), await router.decode.idle()):
        assert snapshot.free_blocks == 128


async def test_cached_prompts_and_preempted_answers_are_those_of_one_engine(pair, make_router, checkpoint):
    """Prompts begin alike, and the pool holds a few sequences of many."""
    config = EngineConfig(num_blocks=24, block_size=8, max_batch_tokens=24, dtype="float32", threads=1)
    alone = Engine.load(checkpoint, config, None, lambda fraction: None)
    pair.num_blocks, pair.layout, pair.max_batch_tokens, pair.backend = 24, alone.layout, 24, "ipc"
    pair.max_num_seqs = 6
    pair.load = lambda segment: (
        Engine.load(checkpoint, config, segment.data_buffer, lambda fraction: None).runner
    )
    prefill = await pair.prefill()
    decode = await pair.decode()
    router = await make_router(prefill, decode)
    rng = random.Random(4)
    common = [rng.randrange(VOCAB_SIZE) for _ in range(40)]

    async def ask(number):
        own = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, 12))]
        prompt = common[: rng.randint(1, 40)] + own
        wanted = TokenSampling(
            0.0 if number % 2 else 0.9, 0, 1.0, number, rng.randint(40, 70), 0, frozenset()
        )
        for attempt in range(100_000):
            answer = await router.submit(RequestKey(f"r{number}", attempt), prompt, wanted)
            if answer.failed is None:
                break
            await next_snapshot(router.decode)
        await answer.done.wait()
        assert answer.failed is None
        return prompt, wanted, answer

    answers = await asyncio.gather(*(ask(number) for number in range(12)))
    for snapshot in (await router.prefill.idle(), await router.decode.idle()):
        assert snapshot.free_blocks == 24
    for prompt, wanted, answer in answers:
        assert answer.token_ids == generate(alone, prompt, wanted)
    assert decode.metric("prelay_preemptions_total") > 0
    assert sum(answer.cached_tokens for _, _, answer in answers) > 0


async def test_a_mixed_worker_answers_as_one_engine(pair, make_router, checkpoint):
    """It reads every second prompt itself, in chunks that are cut by the limits of those who decode, and
    takes the others over; the pool holds a few of them."""
    config = EngineConfig(num_blocks=24, block_size=8, max_batch_tokens=24, dtype="float32", threads=1)
    alone = Engine.load(checkpoint, config, None, lambda fraction: None)
    pair.num_blocks, pair.layout, pair.max_batch_tokens, pair.backend = 24, alone.layout, 24, "ipc"
    pair.max_num_seqs = 6
    pair.load = lambda segment: (
        Engine.load(checkpoint, config, segment.data_buffer, lambda fraction: None).runner
    )
    prefill = await pair.prefill()
    mixed = await pair.decode(is_mixed=True, latency={"step": 0.001, "rows": 0.001})
    router = await make_router(prefill, mixed)
    rng = random.Random(6)
    common = [rng.randrange(VOCAB_SIZE) for _ in range(40)]

    async def ask(number):
        own = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, 12))]
        prompt = common[: rng.randint(1, 40)] + own
        wanted = TokenSampling(
            0.0 if number % 4 < 2 else 0.9, 0, 1.0, number, rng.randint(40, 70), 0, frozenset()
        )
        for attempt in range(100_000):
            key = RequestKey(f"r{number}", attempt)
            if number % 2:
                urgency = worker_pb2.Urgency(ttft_left_s=rng.uniform(-1, 5), tpot_s=rng.uniform(0.005, 0.05))
                answer = await router.read_here(key, prompt, wanted, urgency=urgency)
            else:
                answer = await router.submit(key, prompt, wanted)
            await answer.first.wait()
            if answer.failed is None:
                break
            await next_snapshot(router.decode)
        await answer.done.wait()
        assert answer.failed is None
        return prompt, wanted, answer

    answers = await asyncio.gather(*(ask(number) for number in range(16)))
    for snapshot in (await router.prefill.idle(), await router.decode.idle()):
        assert snapshot.free_blocks == 24
    for prompt, wanted, answer in answers:
        assert answer.token_ids == generate(alone, prompt, wanted)
    assert mixed.metric("prelay_preemptions_total") > 0
    assert mixed.metric("prelay_step_seconds_count", phase="mixed") > 0
    assert sum(answer.cached_tokens for _, _, answer in answers[1::2]) > 0


@pytest.mark.parametrize(("prefill_size", "decode_size"), [(8, 12), (32, 8)])
async def test_layers_that_travel_while_others_are_computed_into_blocks_of_another_size(
    pair, make_router, checkpoint, prefill_size, decode_size
):
    """Chunks that are large enough to be offered in groups of layers; prompts that begin alike."""

    def config(block_size):
        return EngineConfig(
            num_blocks=960 // block_size,
            block_size=block_size,
            max_batch_tokens=256,
            dtype="float32",
            threads=1,
        )

    alone = Engine.load(checkpoint, config(16), None, lambda fraction: None)
    pair.max_batch_tokens, pair.backend = 256, "ipc"

    def use(block_size):
        pair.num_blocks, pair.layout = 960 // block_size, replace(alone.layout, block_size=block_size)
        pair.load = lambda segment: (
            Engine.load(checkpoint, config(block_size), segment.data_buffer, lambda fraction: None).runner
        )

    use(prefill_size)
    prefill = await pair.prefill()
    use(decode_size)
    router = await make_router(prefill, await pair.decode())
    rng = random.Random(5)
    common = [rng.randrange(VOCAB_SIZE) for _ in range(150)]
    cached_tokens = 0
    for number in range(6):
        # 144 tokens, then 120 and 132 of the same, which end with a block on one side or both.
        prompt = common[:144] if number == 0 else common[: 120 + 12 * (number % 2)]
        if number > 3:
            prompt = prompt + [rng.randrange(VOCAB_SIZE) for _ in range(number)]
        wanted = TokenSampling(0.9, 0, 1.0, number, 12, 0, frozenset())
        answer = await router.submit(RequestKey(f"r{number}", 0), prompt, wanted)
        await answer.done.wait()
        assert answer.failed is None
        assert answer.token_ids == generate(alone, prompt, wanted)
        cached_tokens += answer.decode_cached_tokens
    assert cached_tokens > 500
