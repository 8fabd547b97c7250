"""A mixed worker as a service: prompts that it reads itself, beside hand-offs."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import replace

import pytest
from prelay.v1 import worker_pb2

from engine.fake import fake_answer, fake_logprobs
from engine.sequence import RequestKey


async def all_free(pair, router):
    for snapshot in (await router.prefill.idle(), await router.decode.idle()):
        assert snapshot.free_blocks == pair.num_blocks
    for worker in pair.workers:
        assert worker.fatal == []


async def test_prompts_are_read_here_and_elsewhere(pair, make_router, sampling):
    """Two thirds are read by the mixed worker, the others are handed over to it; the pool is too small."""
    pair.num_blocks, pair.max_num_seqs, pair.backend = 40, 8, "ipc"
    decode = await pair.decode(is_mixed=True)
    router = await make_router(await pair.prefill(), decode)
    rng = random.Random(2)

    async def ask(number):
        prompt = [rng.randrange(3) for _ in range(rng.randint(1, 40))]
        wanted = sampling(rng.randint(1, 40), stop=rng.sample(range(2048), 30), seed=number)
        place = router.read_here if number % 3 else router.submit
        for attempt in range(100_000):
            answer = await place(RequestKey(f"r{number}", attempt), prompt, wanted)
            await answer.first.wait()
            if answer.failed is None:
                break
            assert answer.failed.reason == worker_pb2.FAILURE_REASON_NO_BLOCKS
            seen = router.decode.snapshot.seq
            await router.decode.snapshot_when(lambda now, seen=seen: now.seq > seen)
        await answer.done.wait()
        assert answer.token_ids == fake_answer(prompt, wanted)
        assert answer.times.prefill_s > 0
        assert (answer.times.kv_bytes > 0) <= (number % 3 == 0)

    await asyncio.gather(*(ask(number) for number in range(48)))
    await all_free(pair, router)
    assert decode.metric("prelay_preemptions_total") > 0
    assert decode.metric("prelay_prefix_cache_hit_tokens_total") > 0


async def test_nothing_is_said_before_the_first_token(pair, make_router, sampling):
    router = await make_router(await pair.prefill(), await pair.decode(is_mixed=True))
    prompt = list(range(40))
    answer = await router.read_here(RequestKey("a", 0), prompt, replace(sampling(5), prompt_logprobs=1))
    await answer.done.wait()
    assert not answer.reserved.is_set()
    assert answer.token_ids == fake_answer(prompt, sampling(5))
    assert (answer.times.transfer_s, answer.times.decode_queue_s) == (0, 0)
    assert answer.times.prefill_queue_s > 0
    told = [(each.token_id, each.rank) for each in answer.prompt_logprobs]
    assert told == [(at, fake_logprobs(prompt, at, 1).rank) for at in range(1, 40)]
    again = await router.read_here(RequestKey("b", 0), prompt, sampling(1))
    await again.done.wait()
    assert (again.cached_tokens, again.token_ids) == (36, fake_answer(prompt, sampling(1)))
    await all_free(pair, router)


async def test_an_answer_that_was_lost_elsewhere_goes_on(pair, make_router, sampling):
    router = await make_router(await pair.prefill(), await pair.decode(is_mixed=True))
    prompt, wanted = [5, 6, 7, 8, 9], sampling(8, presence_penalty=0.5)
    whole = fake_answer(prompt, wanted)
    answer = await router.read_here(RequestKey("a", 1), prompt + whole[:3], wanted, num_output_tokens=3)
    await answer.done.wait()
    assert answer.tokens == dict(enumerate(whole[3:], start=3))


async def test_a_decode_worker_reads_no_prompts(pair, make_router, sampling):
    router = await make_router(await pair.prefill(), await pair.decode())
    answer = await router.read_here(RequestKey("a", 0), [1, 2, 3], sampling(4))
    await answer.done.wait()
    assert answer.failed.reason == worker_pb2.FAILURE_REASON_INVALID
    assert "this is a decode worker: only a mixed one reads prompts itself" in answer.failed.message


async def test_a_mixed_worker_says_what_it_cannot_read(pair, make_router, sampling):
    pair.num_blocks = 8
    router = await make_router(await pair.prefill(), await pair.decode(is_mixed=True))
    strange = await router.read_here(RequestKey("strange", 0), [1, 2048], sampling(4))
    await strange.done.wait()
    assert strange.failed.reason == worker_pb2.FAILURE_REASON_INVALID
    assert "token id 2048 in the prompt" in strange.failed.message
    held = await router.reserve(RequestKey("held", 0), 20, sampling(4))
    await held.reserved.wait()
    many = await router.read_here(RequestKey("many", 0), [1] * 9, sampling(4))
    await many.done.wait()
    assert many.failed.reason == worker_pb2.FAILURE_REASON_NO_BLOCKS
    assert "4 KV blocks wanted, 2 of 8 are free" in many.failed.message
    await router.cancel(RequestKey("held", 0))
    await all_free(pair, router)


@pytest.mark.parametrize("end", ["cancel", "router gone", "step fails"])
async def test_a_prompt_that_is_half_read_can_end(pair, make_router, sampling, end):
    entered, gate = threading.Event(), threading.Event()
    steps = []

    def before_step(chunks):
        steps.append(chunks)
        if len(steps) == 2:
            entered.set()
            assert gate.wait(20)
            if end == "step fails":
                raise RuntimeError("the device is on fire")

    pair.hooks.decode_step = before_step
    decode = await pair.decode(is_mixed=True)
    router = await make_router(await pair.prefill(), decode)
    answer = await router.read_here(RequestKey("a", 0), [1] * 60, sampling(5))
    await asyncio.to_thread(entered.wait, 20)
    if end == "cancel":
        await router.decode.send(cancel=worker_pb2.Cancel(request_id="a"))
        await decode.took_all_of(router.decode)
    elif end == "router gone":
        await router.decode.close()
        router = await make_router(pair.workers[1], decode, "next")
    gate.set()
    if end == "step fails":
        await answer.done.wait()
        assert "the device is on fire" in answer.failed.message
    await router.decode.idle()
    assert answer.tokens == {}
    assert len(steps) == 2


async def test_a_prompt_can_be_held_while_it_is_read(pair, make_router, sampling):
    entered, gate = threading.Event(), threading.Event()
    pair.hooks.decode_step = lambda chunks: (entered.set(), gate.wait(20))
    decode = await pair.decode(is_mixed=True)
    router = await make_router(await pair.prefill(), decode)
    slow = await router.read_here(RequestKey("slow", 0), [1] * 60, sampling(5))
    await asyncio.to_thread(entered.wait, 20)
    await router.decode.send(pause=worker_pb2.Pause(request_id="slow"))
    other = await router.read_here(RequestKey("other", 0), [2] * 30, sampling(5))
    await decode.took_all_of(router.decode)
    gate.set()
    await other.done.wait()
    assert slow.tokens == {}
    await router.decode.send(resume=worker_pb2.Resume(request_id="slow"))
    await slow.done.wait()
    assert slow.token_ids == fake_answer([1] * 60, sampling(5))
    await all_free(pair, router)


async def test_snapshots_tell_of_prompts_of_decoding_and_of_steps(pair, make_router, sampling):
    """The third step with both is held up: the beat tells what there was before it."""
    begun, come, gate = threading.Event(), threading.Event(), threading.Event()
    sizes = []

    def before_step(chunks):
        sizes.append([len(chunk.token_ids) for chunk in chunks])
        if len(sizes) == 4:
            begun.set()
            assert come.wait(20)
        if sum(map(len, sizes)) == len(sizes) + 3:
            assert gate.wait(20)

    pair.hooks.decode_step = before_step
    decode = await pair.decode(is_mixed=True, latency={"step": 0.010, "rows": 0.001})
    router = await make_router(await pair.prefill(), decode)
    urgency = worker_pb2.Urgency(ttft_left_s=60.0, tpot_s=30.0)
    writes = await router.read_here(RequestKey("writes", 0), [1] * 20, sampling(60), urgency=urgency)
    await asyncio.to_thread(begun.wait, 20)
    reads = await router.read_here(RequestKey("reads", 0), [2] * 70, sampling(4), urgency=urgency)
    await decode.took_all_of(router.decode)
    come.set()
    seen = await router.decode.snapshot_when(lambda now: now.queue_tokens == 70 - 2 * 15)
    assert (seen.running_requests, seen.queue_requests, seen.decoding_requests) == (2, 0, 1)
    # Three tokens before the prompt came, one more with the step that it came in, and two beside it.
    assert seen.decode_context == 20 + 5
    assert seen.least_tpot_s == 30.0
    gate.set()
    for answer in (reads, writes):
        await answer.done.wait()
    idle = await router.decode.idle()
    assert (idle.queue_tokens, idle.decoding_requests, idle.decode_context, idle.least_tpot_s) == (0, 0, 0, 0)
    assert sum(1 for step in router.decode.steps if step.new_tokens and step.decode_requests) > 0
    assert all(step.seconds > 0 for step in router.decode.steps)
    assert decode.metric("prelay_step_seconds_count", phase="mixed") == 5
    assert decode.metric("prelay_step_seconds_count", phase="decode") > 0


async def test_routers_are_told_what_was_read(pair, make_router, sampling):
    router = await make_router(await pair.prefill(), await pair.decode(is_mixed=True))
    answer = await router.read_here(RequestKey("a", 0), list(range(9)), sampling(3))
    await answer.done.wait()
    stored = set()
    while len(stored) < 2:
        events = await router.blocks.get()
        stored |= {digest for event in events.events for digest in event.stored}
    assert len(stored) == 2
