"""A pair of services in which things go wrong: every block comes back, and the router learns of it."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import replace

import pytest
from prelay.v1 import worker_pb2

from engine.fake import fake_answer
from engine.router_messages import RouterGone
from engine.sequence import RequestKey
from transfer.errors import TransferError


class Gate:
    """Holds an engine or transfer thread at a hook. The test waits for `entered`, then opens."""

    def __init__(self):
        self._entered, self._open = threading.Event(), threading.Event()

    def __call__(self, _):
        self._entered.set()
        assert self._open.wait(20)

    async def entered(self):
        assert await asyncio.to_thread(self._entered.wait, 20)

    def open(self):
        self._open.set()


async def all_free(pair, *routers):
    for router in routers:
        for snapshot in (await router.prefill.idle(), await router.decode.idle()):
            assert snapshot.free_blocks == pair.num_blocks
    for worker in pair.workers:
        assert worker.fatal == []


async def started(pair, make_router):
    prefill = await pair.prefill()
    decode = await pair.decode()
    return prefill, decode, await make_router(prefill, decode)


async def test_random_cancels_leave_all_other_answers_right(pair, make_router, sampling):
    pair.num_blocks = 4096
    pair.backend = "ipc"
    _, _, router = await started(pair, make_router)
    rng = random.Random(7)

    async def ask(number):
        prompt = [rng.randrange(2048) for _ in range(rng.randint(1, 60))]
        wanted = sampling(rng.randint(1, 16), seed=number)
        key = RequestKey(f"r{number}", 0)
        leave_at = rng.choice(["reserve", "reserved", "prefill", "first", "decoding", "never", "never"])
        answer = await router.reserve(key, prompt, wanted)
        if leave_at != "reserve":
            await answer.reserved.wait()
            if leave_at != "reserved":
                await router.start_prefill(key, prompt, wanted)
                if leave_at in ("first", "decoding"):
                    await answer.first.wait()
                if leave_at == "decoding":
                    beat = router.decode.snapshot.seq
                    await router.decode.snapshot_when(lambda now: now.seq > beat)
        if leave_at == "never":
            await answer.done.wait()
            assert answer.token_ids == fake_answer(prompt, wanted)
        else:
            await router.cancel(key)
            undisturbed = fake_answer(prompt, wanted)
            assert all(token == undisturbed[i] for i, token in answer.tokens.items())
        assert answer.failed is None

    await asyncio.gather(*(ask(number) for number in range(240)))
    await all_free(pair, router)


async def test_cancel_while_a_prompt_waits_and_while_it_is_computed(pair, make_router, sampling):
    gate = Gate()
    pair.hooks.prefill_step = gate
    prefill, _, router = await started(pair, make_router)
    running, waiting = RequestKey("running", 0), RequestKey("waiting", 0)
    answer = await router.submit(running, [1] * 60, sampling())
    await gate.entered()
    other = await router.submit(waiting, [2] * 60, sampling())
    await router.cancel(running)
    await router.cancel(waiting)
    await prefill.took_all_of(router.prefill)
    gate.open()
    await all_free(pair, router)
    # The first step took 16 of the 60 tokens; nothing was computed after that.
    assert (answer.tokens, other.tokens) == ({}, {})
    assert prefill.metric("prelay_batch_tokens_count") == 1


async def test_cancel_while_the_kv_is_copied_frees_only_after_the_copy(pair, make_router, sampling):
    gate = Gate()
    pair.hooks.copy = gate
    _, _, router = await started(pair, make_router)
    key = RequestKey("a", 0)
    await router.submit(key, [1, 2, 3, 4, 5], sampling(6))
    await gate.entered()
    await router.cancel(key)
    commands = router.decode.sent
    during = await router.decode.snapshot_when(lambda now: now.commands_seen == commands)
    assert during.leased_blocks == 3
    commands = router.prefill.sent
    during = await router.prefill.snapshot_when(lambda now: now.commands_seen == commands)
    assert during.leased_blocks == 2
    gate.open()
    await all_free(pair, router)


async def test_cancel_while_decoding_stops_at_the_step(pair, make_router, sampling):
    gate = Gate()
    pair.hooks.decode_step = gate
    _, decode, router = await started(pair, make_router)
    key = RequestKey("a", 0)
    answer = await router.submit(key, [1, 2, 3], sampling(100))
    await gate.entered()
    await router.cancel(key)
    await router.cancel(key)
    await decode.took_all_of(router.decode)
    gate.open()
    await all_free(pair, router)
    assert len(answer.tokens) <= 2


async def test_the_end_of_a_routers_stream_cancels_what_is_its_own(pair, make_router, sampling):
    gate = Gate()
    pair.hooks.decode_step = gate
    prefill, decode, staying = await started(pair, make_router)
    leaving = await make_router(prefill, decode, "leaving")
    kept = await staying.reserve(RequestKey("a", 0), 3, sampling(50))
    await leaving.reserve(RequestKey("b", 0), 10, sampling(50))
    await leaving.submit(RequestKey("a", 0), [4, 5, 6], sampling(50))
    await gate.entered()
    await leaving.prefill.close()
    await leaving.decode.close()
    await decode.took(lambda event: isinstance(event, RouterGone))
    gate.open()
    await staying.start_prefill(RequestKey("a", 0), [1, 2, 3], sampling(50))
    await kept.done.wait()
    assert kept.token_ids == fake_answer([1, 2, 3], sampling(50))
    await all_free(pair, staying)
    # One token of the request that left, 49 of the one that stayed.
    assert decode.metric("prelay_batch_tokens_sum") == 50


@pytest.mark.parametrize(
    ("layout", "fingerprint", "named"),
    [
        ({"num_layers": 3}, "model", "layout.num_layers: 3 at prefill-0, 2 at decode-0"),
        ({"dtype": "bfloat16"}, "model", "layout.dtype: 'bfloat16' at prefill-0, 'float32' at decode-0"),
        ({"num_kv_heads": 1}, "model", "layout.num_kv_heads: 1 at prefill-0, 2 at decode-0"),
        ({"head_dim": 8}, "model", "layout.head_dim: 8 at prefill-0, 4 at decode-0"),
        ({}, "other", "model_fingerprint: 'other' at prefill-0, 'model' at decode-0"),
    ],
)
async def test_workers_that_do_not_fit_are_refused_naming_the_field(
    pair, make_router, sampling, kv_layout, layout, fingerprint, named
):
    prefill = await pair.prefill(layout=replace(kv_layout, **layout), fingerprint=fingerprint)
    decode = await pair.decode()
    router = await make_router(prefill, decode)
    answer = await router.reserve(RequestKey("a", 0), 5, sampling())
    await answer.done.wait()
    assert answer.failed.reason == worker_pb2.FAILURE_REASON_PEER_MISMATCH
    assert named in answer.failed.message
    await all_free(pair, router)


async def test_workers_without_a_common_backend_are_refused(pair, make_router, sampling):
    prefill = await pair.prefill()
    pair.backend = "ipc"
    router = await make_router(prefill, await pair.decode())
    answer = await router.reserve(RequestKey("a", 0), 5, sampling())
    await answer.done.wait()
    assert answer.failed.reason == worker_pb2.FAILURE_REASON_PEER_MISMATCH
    assert "decode-0 can use ['ipc'], prefill-0 serves ['memory']" in answer.failed.message


async def test_another_life_at_the_address_is_not_the_peer(pair, make_router, sampling):
    prefill = await pair.prefill(epoch=5)
    router = await make_router(prefill, await pair.decode())
    router._refs[0].epoch = 4
    answer = await router.reserve(RequestKey("a", 0), 5, sampling())
    await answer.done.wait()
    assert answer.failed.reason == worker_pb2.FAILURE_REASON_PEER_UNREACHABLE
    assert "prefill-0@5 answers at the address of prefill-0@4" in answer.failed.message
    await all_free(pair, router)


async def test_nobody_at_the_address(pair, make_router, sampling):
    prefill = await pair.prefill()
    router = await make_router(prefill, await pair.decode())
    router._refs[0].address = "127.0.0.1:1"
    answer = await router.reserve(RequestKey("a", 0), 5, sampling())
    await answer.done.wait()
    assert answer.failed.reason == worker_pb2.FAILURE_REASON_PEER_UNREACHABLE
    await all_free(pair, router)


async def test_prefill_stops_while_a_prompt_is_computed(pair, make_router, sampling):
    """Decode frees what was reserved and reports; what it runs goes on; a new life is dialled."""
    pair.backend = "ipc"
    prefill, decode, router = await started(pair, make_router)
    decode_gate, prefill_gate = Gate(), Gate()
    pair.hooks.decode_step = decode_gate
    lost = await router.reserve(RequestKey("lost", 0), 3, sampling())
    lost_too = await router.reserve(RequestKey("lost_too", 0), 3, sampling())
    running = await router.submit(RequestKey("running", 0), [9, 8, 7], sampling(30))
    await decode_gate.entered()
    pair.hooks.prefill_step = prefill_gate
    await router.start_prefill(RequestKey("lost", 0), [1, 2, 3], sampling())
    await prefill_gate.entered()

    pair.workers.remove(prefill)
    stopping = asyncio.create_task(prefill.stop())
    decode_gate.open()
    for answer in (lost, lost_too):
        await answer.done.wait()
        assert answer.failed.reason == worker_pb2.FAILURE_REASON_PEER_UNREACHABLE
    await running.done.wait()
    assert running.token_ids == fake_answer([9, 8, 7], sampling(30))
    assert (await router.decode.idle()).free_blocks == pair.num_blocks
    prefill_gate.open()
    await stopping

    again = await make_router(await pair.prefill(epoch=2), decode, "again")
    answer = await again.submit(RequestKey("a", 0), [5, 6, 7], sampling())
    await answer.done.wait()
    assert answer.token_ids == fake_answer([5, 6, 7], sampling())
    await all_free(pair, again)


async def test_decode_stops_while_the_kv_is_copied(pair, make_router, sampling):
    gate = Gate()
    pair.hooks.copy = gate
    _, decode, router = await started(pair, make_router)
    await router.submit(RequestKey("a", 0), [1, 2, 3, 4, 5], sampling(6))
    await gate.entered()
    await decode.stop()
    pair.workers.remove(decode)
    assert (await router.prefill.idle()).free_blocks == pair.num_blocks
    gate.open()


async def test_a_copy_that_fails_fails_its_request_only(pair, make_router, sampling):
    _, decode, router = await started(pair, make_router)

    def fail(_):
        raise TransferError("the cable is cut")

    pair.hooks.copy = fail
    failed = await router.submit(RequestKey("a", 0), [1, 2, 3, 4, 5], sampling(6))
    await failed.done.wait()
    assert failed.failed.reason == worker_pb2.FAILURE_REASON_TRANSFER_FAILED
    assert "the cable is cut" in failed.failed.message
    pair.hooks.copy = lambda blocks: None
    good = await router.submit(RequestKey("a", 1), [1, 2, 3, 4, 5], sampling(6))
    await good.done.wait()
    assert good.token_ids == fake_answer([1, 2, 3, 4, 5], sampling(6))
    await all_free(pair, router)
    assert decode.metric("prelay_transfer_failures_total", reason="transfer_failed") == 1


async def test_blocks_recycled_under_the_copy_are_noticed(pair, make_router, sampling):
    prefill, _, router = await started(pair, make_router)

    def recycle(part):
        prefill.segment.blocks[list(part.blocks)] = 255
        prefill.segment.generations[list(part.blocks)] += 1

    pair.hooks.copy = recycle
    answer = await router.submit(RequestKey("a", 0), [1, 2, 3, 4, 5], sampling(6))
    await answer.done.wait()
    assert answer.failed.reason == worker_pb2.FAILURE_REASON_TRANSFER_FAILED
    assert "2 of 2 blocks were recycled" in answer.failed.message
    assert answer.tokens.keys() <= {0}
    await all_free(pair, router)


async def test_other_bytes_than_were_offered_fail_closed_and_are_counted(pair, make_router, sampling):
    """A copy that goes wrong without anybody recycling a block: only the digests see it."""
    prefill, decode, router = await started(pair, make_router)

    def spoil(part):
        prefill.segment.blocks[part.blocks[0], 5] ^= 1

    pair.hooks.copy = spoil
    answer = await router.submit(RequestKey("a", 0), [1, 2, 3, 4, 5], sampling(6))
    await answer.done.wait()
    assert answer.failed.reason == worker_pb2.FAILURE_REASON_TRANSFER_FAILED
    assert "other bytes than were offered" in answer.failed.message
    assert answer.tokens.keys() <= {0}
    await all_free(pair, router)
    assert decode.metric("prelay_transfer_digests_total", outcome="bad") == 1


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_step_that_fails_fails_its_requests_and_the_worker_goes_on(pair, make_router, sampling, side):
    _, _, router = await started(pair, make_router)

    def fail(_):
        raise ValueError("out of cheese")

    setattr(pair.hooks, f"{side}_step", fail)
    failed = await router.submit(RequestKey("a", 0), [1, 2, 3], sampling(6))
    await failed.done.wait()
    assert failed.failed.reason == worker_pb2.FAILURE_REASON_INTERNAL
    assert "out of cheese" in failed.failed.message
    setattr(pair.hooks, f"{side}_step", lambda chunks: None)
    good = await router.submit(RequestKey("a", 1), [1, 2, 3], sampling(6))
    await good.done.wait()
    assert good.token_ids == fake_answer([1, 2, 3], sampling(6))
    await all_free(pair, router)


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_step_longer_than_a_lease_ends_no_hand_off(pair, make_router, sampling, side):
    """One request is in the step; the others reach the worker, and wait for it, while the step runs."""
    pair.lease_s = 1.0
    gate = Gate()
    prefill, decode, router = await started(pair, make_router)
    wanted = sampling(6)
    setattr(pair.hooks, f"{side}_step", gate)
    waiting = [RequestKey(f"r{number}", 0) for number in range(3)]
    if side == "decode":  # its engine confirms reservations, so it must do that before the step
        for key in waiting:
            await (await router.reserve(key, 3, wanted)).reserved.wait()
    first = await router.submit(RequestKey("first", 0), [9, 8, 7], wanted)
    await gate.entered()
    for key in waiting:
        if side == "prefill":
            await router.submit(key, [1, 2, 3], wanted)
        else:
            await router.start_prefill(key, [1, 2, 3], wanted)
    await prefill.took_all_of(router.prefill)
    beats = router.decode.snapshot.seq
    await router.decode.snapshot_when(lambda now: now.seq > beats + 50)  # 2.5 s
    gate.open()
    for answer, prompt in (
        (first, [9, 8, 7]),
        *((router.answers[key], [1, 2, 3]) for key in waiting),
    ):
        await answer.done.wait()
        assert answer.failed is None
        assert answer.token_ids == fake_answer(prompt, wanted)
    await all_free(pair, router)
    for worker in (prefill, decode):
        assert worker.metric("prelay_lease_expirations_total") == 0
        links = worker.service._links
        ends = [each.end for each in links._links.values()] if worker is prefill else links._ends.values()
        assert [end.held for end in ends] == [set()]


async def test_a_lease_that_is_not_renewed_ends(pair, make_router, sampling):
    """Reserved, but the router never sends Prefill: the prefill worker has nothing to renew."""
    pair.lease_s = 0.2
    _, decode, router = await started(pair, make_router)
    answer = await router.reserve(RequestKey("a", 0), 5, sampling())
    await answer.done.wait()
    assert answer.failed.reason == worker_pb2.FAILURE_REASON_LEASE_EXPIRED
    await all_free(pair, router)
    assert decode.metric("prelay_lease_expirations_total") == 1


async def test_leases_live_as_long_as_both_sides_work_on_them(pair, make_router, sampling):
    """A prompt that waits for several lease times is not given up, for its prefill worker renews."""
    pair.lease_s = 0.8
    gate = Gate()
    pair.hooks.copy = gate
    _, decode, router = await started(pair, make_router)
    wanted = sampling(6)
    answer = await router.submit(RequestKey("a", 0), [1, 2, 3], wanted)
    await gate.entered()
    beats = router.decode.snapshot.seq
    await router.decode.snapshot_when(lambda now: now.seq > beats + 24)
    gate.open()
    await answer.done.wait()
    assert answer.token_ids == fake_answer([1, 2, 3], wanted)
    await all_free(pair, router)
    assert decode.metric("prelay_lease_expirations_total") == 0
