"""A pair of services without faults: undisturbed answers, and every block free afterwards."""

from __future__ import annotations

import asyncio
import random
import threading

from prelay.v1 import worker_pb2

from engine.fake import fake_answer
from engine.sequence import RequestKey


async def all_free(pair, *routers):
    """Nothing is held on either side, the engines are whole, and the books say the same."""
    for router in routers:
        for snapshot in (await router.prefill.idle(), await router.decode.idle()):
            assert snapshot.free_blocks == pair.num_blocks
    for worker in pair.workers:
        assert worker.fatal == []


async def next_snapshot(stream):
    seen = stream.snapshot.seq
    await stream.snapshot_when(lambda now: now.seq > seen)


async def test_many_requests_at_once_get_the_undisturbed_answer(pair, make_router, sampling):
    pair.backend = "ipc"
    prefill = await pair.prefill()
    decode = await pair.decode()
    router = await make_router(prefill, decode)
    rng = random.Random(1)

    async def ask(number):
        prompt = [rng.randrange(2048) for _ in range(rng.randint(1, 50))]
        wanted = sampling(rng.randint(1, 20), stop=rng.sample(range(2048), 60), seed=number)
        for attempt in range(1000):
            answer = await router.submit(RequestKey(f"r{number}", attempt), prompt, wanted)
            if answer.failed is None:
                break
            # Pool and batch are far too small for all: workers refuse, the router queues.
            assert answer.failed.reason == worker_pb2.FAILURE_REASON_NO_BLOCKS
            await router.decode.snapshot_when(lambda now: now.free_blocks >= 18)
        await answer.done.wait()
        assert answer.token_ids == fake_answer(prompt, wanted)
        stopped = answer.token_ids[-1] in wanted.stop_token_ids
        assert answer.stop_reason == (
            worker_pb2.STOP_REASON_STOP if stopped else worker_pb2.STOP_REASON_LENGTH
        )
        return len(answer.tokens) > 1, len(prompt)

    served = await asyncio.gather(*(ask(number) for number in range(48)))
    await all_free(pair, router)
    # What ends with its first token was offered before that was known.
    moved = sum(-(-num_tokens // 4) for handed_over, num_tokens in served if handed_over)
    most = sum(-(-num_tokens // 4) for _, num_tokens in served)
    assert moved * 512 <= decode.metric("prelay_transfer_bytes_total", backend="ipc") <= most * 512
    assert decode.metric("prelay_transfer_digests_total", outcome="good") >= len(served) / 2
    assert decode.metric("prelay_transfer_digests_total", outcome="bad") == 0
    assert prefill.metric("prelay_batch_tokens_sum") == sum(n for _, n in served)
    states = {state: prefill.metric("prelay_kv_blocks", state=state) for state in ("free", "cached")}
    assert sum(states.values()) == pair.num_blocks
    assert states["cached"] > 0


async def test_what_a_worker_has_is_shown_before_its_first_request(pair):
    prefill = await pair.prefill()
    decode = await pair.decode()
    for worker in (prefill, decode):
        states = [worker.metric("prelay_kv_blocks", state=state) for state in ("free", "owned", "leased")]
        assert states == [pair.num_blocks, 0, 0]
    assert prefill.metric("prelay_leases", state="promised") == 0
    assert decode.metric("prelay_leases", state="reserved") == 0
    assert decode.metric("prelay_transfer_bytes_total", backend="memory") == 0
    assert decode.metric("prelay_transfer_seconds_count", backend="memory") == 0
    assert decode.metric("prelay_transfer_failures_total", reason="lease_expired") == 0


async def test_two_routers_may_use_the_same_request_ids(pair, make_router, sampling):
    prefill = await pair.prefill()
    decode = await pair.decode()
    one, two = await make_router(prefill, decode, "one"), await make_router(prefill, decode, "two")
    key = RequestKey("same", 0)
    wanted = sampling(12)
    answers = await asyncio.gather(
        one.submit(key, [1, 2, 3], wanted), two.submit(key, [4, 5, 6, 7, 8], wanted)
    )
    for answer, prompt in zip(answers, ([1, 2, 3], [4, 5, 6, 7, 8]), strict=True):
        await answer.done.wait()
        assert answer.token_ids == fake_answer(prompt, wanted)
    await all_free(pair, one, two)


async def test_the_first_token_does_not_wait_for_the_transfer(pair, make_router, sampling):
    gate = threading.Event()
    pair.hooks.copy = lambda blocks: gate.wait(20)
    prefill = await pair.prefill()
    decode = await pair.decode()
    router = await make_router(prefill, decode)
    wanted = sampling(6)
    answer = await router.submit(RequestKey("a", 0), [1, 2, 3, 4, 5], wanted)
    await answer.first.wait()
    held = await router.prefill.snapshot_when(lambda now: now.leased_blocks > 0)
    assert held.leased_blocks == 2
    assert list(answer.tokens) == [0]
    gate.set()
    await answer.done.wait()
    assert answer.token_ids == fake_answer([1, 2, 3, 4, 5], wanted)
    assert answer.times.kv_bytes == 2 * 512
    assert answer.times.transfer_s > 0
    assert answer.times.prefill_s > 0
    await all_free(pair, router)


async def test_an_answer_of_one_token_is_never_handed_over(pair, make_router, sampling):
    prefill = await pair.prefill()
    decode = await pair.decode()
    router = await make_router(prefill, decode)
    answer = await router.submit(RequestKey("a", 0), [1, 2, 3], sampling(1))
    await answer.done.wait()
    assert answer.token_ids == fake_answer([1, 2, 3], sampling(1))
    assert answer.stop_reason == worker_pb2.STOP_REASON_LENGTH
    await all_free(pair, router)
    assert decode.metric("prelay_transfer_bytes_total", backend="memory") == 0


async def test_blocks_are_reserved_for_the_prompt_and_one_more_or_refused_at_once(
    pair, make_router, sampling
):
    pair.num_blocks = 10
    prefill = await pair.prefill()
    decode = await pair.decode()
    router = await make_router(prefill, decode)
    first = await router.reserve(RequestKey("first", 0), 16, sampling(12))
    await first.reserved.wait()
    second = await router.reserve(RequestKey("second", 0), 13, sampling(12))
    await second.done.wait()
    assert second.failed.reason == worker_pb2.FAILURE_REASON_NO_BLOCKS
    assert "5 KV blocks wanted, 5 of 10 are free" in second.failed.message
    assert "one has to stay free for each of 1 requests" in second.failed.message
    third = await router.reserve(RequestKey("third", 0), 13, sampling(3))
    await third.reserved.wait()
    assert third.failed is None  # four blocks hold prompt and answer: nothing more is set aside
    never = await router.reserve(RequestKey("never", 0), 20, sampling(21))
    await never.done.wait()
    assert never.failed.reason == worker_pb2.FAILURE_REASON_INVALID
    await router.cancel(RequestKey("first", 0))
    await router.cancel(RequestKey("third", 0))
    await all_free(pair, router)


async def test_what_a_worker_can_never_serve_is_refused_with_the_reason(pair, make_router, sampling):
    prefill = await pair.prefill()
    decode = await pair.decode()
    router = await make_router(prefill, decode)

    async def refused(name, stream, **message):
        await stream.send(**message)
        await router.answers[RequestKey(name, 0)].done.wait()
        failed = router.answers[RequestKey(name, 0)].failed
        assert failed.reason == worker_pb2.FAILURE_REASON_INVALID
        return failed.message

    wire = worker_pb2.TokenSampling(max_tokens=10)
    empty = worker_pb2.Prefill(request_id="empty", sampling=wire)
    assert "0 prompt tokens" in await refused("empty", router.prefill, prefill=empty)
    long = worker_pb2.Prefill(request_id="long", token_ids=[1] * 191, sampling=wire)
    assert "exceed 200" in await refused("long", router.prefill, prefill=long)
    strange = worker_pb2.Prefill(request_id="strange", token_ids=[1, 2048], sampling=wire)
    assert "token id 2048" in await refused("strange", router.prefill, prefill=strange)
    long_too = worker_pb2.Reserve(request_id="long_too", token_ids=[1] * 191, sampling=wire)
    assert "exceed 200" in await refused("long_too", router.decode, reserve=long_too)
    reserve = worker_pb2.Reserve(request_id="wrong", token_ids=[1], sampling=wire)
    assert "prefill worker" in await refused("wrong", router.prefill, reserve=reserve)
    prefill_message = worker_pb2.Prefill(request_id="wrong_too", token_ids=[1], sampling=wire)
    assert "decode worker" in await refused("wrong_too", router.decode, prefill=prefill_message)
    await all_free(pair, router)


async def test_a_snapshot_counts_commands_only_when_they_are_taken_into_account(pair, make_router, sampling):
    entered, gate = threading.Event(), threading.Event()

    def hold(chunks):
        entered.set()
        gate.wait(20)

    pair.hooks.prefill_step = hold
    prefill = await pair.prefill()
    decode = await pair.decode()
    router = await make_router(prefill, decode)
    await router.submit(RequestKey("a", 0), [1, 2, 3], sampling(4))
    await asyncio.to_thread(entered.wait, 20)
    # The engine is in a step: the beat goes on, without the command that waits in the inbox.
    sent = await router.prefill.send(cancel=worker_pb2.Cancel(request_id="unknown", attempt=0))
    await prefill.took_all_of(router.prefill)
    before = router.prefill.snapshot.seq
    during = await router.prefill.snapshot_when(lambda now: now.seq >= before + 3)
    assert during.commands_seen == sent - 1
    gate.set()
    await router.prefill.snapshot_when(lambda now: now.commands_seen == sent)
    await router.answers[RequestKey("a", 0)].done.wait()
    await all_free(pair, router)


async def test_a_pool_far_too_small_for_all_preempts_and_changes_no_answer(pair, make_router, sampling):
    pair.num_blocks, pair.max_num_seqs = 24, 8
    prefill = await pair.prefill()
    decode = await pair.decode()
    router = await make_router(prefill, decode)
    rng = random.Random(5)

    async def ask(number):
        prompt = [rng.randrange(2048) for _ in range(rng.randint(1, 12))]
        wanted = sampling(rng.randint(30, 60), seed=number)
        for attempt in range(100_000):
            answer = await router.submit(RequestKey(f"r{number}", attempt), prompt, wanted)
            if answer.failed is None:
                break
            assert answer.failed.reason == worker_pb2.FAILURE_REASON_NO_BLOCKS
            await next_snapshot(router.decode)
        await answer.done.wait()
        assert answer.token_ids == fake_answer(prompt, wanted)

    await asyncio.gather(*(ask(number) for number in range(24)))
    await all_free(pair, router)
    assert decode.metric("prelay_preemptions_total") > 0


async def test_what_was_read_before_is_not_computed_again_by_anybody_but_its_tenant(
    pair, make_router, sampling
):
    pair.backend = "ipc"
    prefill = await pair.prefill()
    decode = await pair.decode()
    router = await make_router(prefill, decode)
    rng = random.Random(6)
    common = [rng.randrange(2048) for _ in range(22)]
    for number, (prompt, salt, cached) in enumerate(
        [
            (common, "", 0),
            (common, "", 20),  # five blocks of four
            (common[:20], "", 16),  # the last token is always computed
            (common[:11] + [7] * 9, "", 8),
            (common, "tenant", 0),
            (common, "tenant", 20),
        ]
    ):
        wanted = sampling(9, seed=number)
        answer = await router.submit(RequestKey(f"r{number}", 0), prompt, wanted, salt)
        await answer.done.wait()
        assert answer.token_ids == fake_answer(prompt, wanted)
        assert answer.cached_tokens == cached
    await all_free(pair, router)
    assert prefill.metric("prelay_prefix_cache_hit_tokens_total") == 64
    assert prefill.metric("prelay_batch_tokens_sum") == 4 * 22 + 2 * 20 - 64
    assert prefill.metric("prelay_kv_blocks", state="cached") > 0
