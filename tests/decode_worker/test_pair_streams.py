"""Streams that begin elsewhere, wait, and overlap: resumed answers, held sequences, offers during prefill."""

from __future__ import annotations

import random
import threading

import pytest
from prelay.v1 import worker_pb2

from engine.fake import fake_answer
from engine.sequence import RequestKey


@pytest.mark.parametrize("num_emitted", [1, 2, 7])
async def test_a_resumed_answer_goes_on_as_the_undisturbed_one(pair, make_router, sampling, num_emitted):
    router = await make_router(await pair.prefill(), await pair.decode())
    prompt, wanted = [5, 6, 7, 8, 9], sampling(8, seed=3)
    whole = fake_answer(prompt, wanted)
    answer = await router.submit(
        RequestKey("a", 2), prompt + whole[:num_emitted], wanted, num_output_tokens=num_emitted
    )
    await answer.done.wait()
    assert answer.failed is None
    assert answer.tokens == dict(enumerate(whole[num_emitted:], start=num_emitted))
    assert answer.stop_reason == worker_pb2.STOP_REASON_LENGTH


async def test_penalties_of_a_resumed_answer_count_what_was_emitted(pair, make_router, sampling):
    router = await make_router(await pair.prefill(), await pair.decode())
    prompt, wanted = [5, 6, 7, 8, 9], sampling(8, presence_penalty=0.5)
    whole = fake_answer(prompt, wanted)
    assert whole != fake_answer(prompt, sampling(8))
    answer = await router.submit(RequestKey("a", 2), prompt + whole[:3], wanted, num_output_tokens=3)
    await answer.done.wait()
    assert [answer.tokens[i] for i in range(3, 8)] == whole[3:]


async def test_a_resumed_answer_that_is_complete_is_refused(pair, make_router, sampling):
    router = await make_router(await pair.prefill(), await pair.decode())
    answer = await router.reserve(RequestKey("a", 2), [1, 2, 3], sampling(2), num_output_tokens=2)
    await answer.done.wait()
    assert answer.failed.reason == worker_pb2.FAILURE_REASON_INVALID
    assert "1 prompt tokens, 2 tokens of the answer and max_tokens 2" in answer.failed.message


async def test_kv_is_copied_while_the_rest_of_the_prompt_is_computed(pair, make_router, sampling):
    """The third step cannot begin before what the first two computed is on the decode worker."""
    pair.backend = "ipc"
    prefill, decode = await pair.prefill(), await pair.decode()
    router = await make_router(prefill, decode)
    prompt = random.Random(1).choices(range(2048), k=40)
    copied = threading.Event()
    steps = []

    def before_step(chunks):
        steps.append(sum(len(chunk.token_ids) for chunk in chunks))
        if len(steps) == 3:
            assert copied.wait(20)

    pair.hooks.prefill_step = before_step
    answer = await router.submit(RequestKey("a", 0), prompt, sampling(6))
    while decode.metric("prelay_transfer_bytes_total", backend="ipc") < 32 // 4 * 512:
        await router.decode.snapshot_when(lambda now, seq=router.decode.snapshot.seq: now.seq > seq)
    assert 0 not in answer.tokens
    copied.set()
    await answer.done.wait()
    assert steps == [16, 16, 8]
    assert answer.token_ids == fake_answer(prompt, sampling(6))
    assert answer.times.kv_bytes == 40 // 4 * 512


async def test_what_the_decode_worker_has_is_not_sent_again(pair, make_router, sampling):
    pair.backend = "ipc"
    prefill, decode = await pair.prefill(), await pair.decode()
    router = await make_router(prefill, decode)
    rng = random.Random(2)
    prompt = rng.choices(range(2048), k=22)
    first = await router.submit(RequestKey("turn", 0), prompt, sampling(11))
    await first.done.wait()
    assert first.times.kv_bytes == 6 * 512
    # Of prompt and answer, 32 tokens were computed: eight full blocks.
    again = prompt + first.token_ids + rng.choices(range(2048), k=7)
    second = await router.submit(RequestKey("turn", 1), again, sampling(5, seed=4))
    await second.done.wait()
    assert second.token_ids == fake_answer(again, sampling(5, seed=4))
    assert second.decode_cached_tokens == 32
    assert second.times.kv_bytes == (10 - 8) * 512
    third = await router.submit(RequestKey("turn", 2), again, sampling(5, seed=4), salt="other tenant")
    await third.done.wait()
    assert (third.decode_cached_tokens, third.times.kv_bytes) == (0, 10 * 512)


async def test_a_held_sequence_waits_and_the_others_go_on(pair, make_router, sampling):
    router = await make_router(await pair.prefill(), await pair.decode())
    slow, other = RequestKey("slow", 0), RequestKey("other", 0)
    held = await router.reserve(slow, [1, 2, 3], sampling(9))
    await held.reserved.wait()
    await router.decode.send(pause=worker_pb2.Pause(request_id="slow"))
    await router.start_prefill(slow, [1, 2, 3], sampling(9))
    quick = await router.submit(other, [4, 5, 6], sampling(9))
    await quick.done.wait()
    await held.first.wait()
    assert list(held.tokens) == [0]
    await router.decode.send(resume=worker_pb2.Resume(request_id="slow"))
    await held.done.wait()
    assert held.token_ids == fake_answer([1, 2, 3], sampling(9))


async def test_a_held_sequence_gives_its_blocks_to_those_who_go_on(pair, make_router, sampling):
    """The pool holds one long answer: the held one, though it came first, is computed again later."""
    pair.num_blocks = 14
    decode = await pair.decode()
    router = await make_router(await pair.prefill(), decode)
    held = await router.reserve(RequestKey("slow", 0), [1] * 17, sampling(9))
    await held.reserved.wait()
    await router.decode.send(pause=worker_pb2.Pause(request_id="slow"))
    await router.start_prefill(RequestKey("slow", 0), [1] * 17, sampling(9))
    await held.first.wait()
    long = await router.submit(RequestKey("long", 0), [2, 3, 4], sampling(45))
    await long.done.wait()
    assert long.token_ids == fake_answer([2, 3, 4], sampling(45))
    assert decode.metric("prelay_preemptions_total") == 1
    # Who waits by itself only does not keep others out.
    more = await router.submit(RequestKey("more", 0), [2, 3, 5], sampling(4))
    await more.done.wait()
    assert more.failed is None
    await router.decode.send(resume=worker_pb2.Resume(request_id="slow"))
    await held.done.wait()
    assert held.token_ids == fake_answer([1] * 17, sampling(9))


async def test_cancel_of_a_held_sequence_frees_it(pair, make_router, sampling):
    router = await make_router(await pair.prefill(), await pair.decode())
    key = RequestKey("slow", 0)
    held = await router.submit(key, [1] * 17, sampling(100))
    await router.decode.send(pause=worker_pb2.Pause(request_id="slow"))
    await held.first.wait()
    await router.cancel(key)
    await router.decode.idle()
    await router.prefill.idle()


async def test_a_pair_is_linked_when_it_is_asked_for_and_says_so(pair, make_router, sampling):
    prefill, decode = await pair.prefill(), await pair.decode()
    router = await make_router(prefill, decode)
    await router.decode.send(pair=worker_pb2.Pair(prefill=prefill.ref))
    state = await router.pair_states.get()
    assert (state.worker_id, state.epoch, state.linked, state.backend) == ("prefill-0", 1, True, "memory")
    # A second router is told as well.
    other = await make_router(prefill, decode, "other")
    await other.decode.send(pair=worker_pb2.Pair(prefill=prefill.ref))
    assert (await other.pair_states.get()).linked


async def test_a_pair_that_does_not_fit_is_refused_before_any_request(pair, make_router):
    prefill, decode = await pair.prefill(fingerprint="other"), await pair.decode()
    router = await make_router(prefill, decode)
    await router.decode.send(pair=worker_pb2.Pair(prefill=prefill.ref))
    state = await router.pair_states.get()
    assert not state.linked
    assert state.reason == worker_pb2.FAILURE_REASON_PEER_MISMATCH
    assert "model_fingerprint: 'other' at prefill-0, 'model' at decode-0" in state.message


async def test_a_link_that_broke_is_dialled_again(pair, make_router, sampling):
    prefill, decode = await pair.prefill(), await pair.decode()
    router = await make_router(prefill, decode)
    await router.decode.send(pair=worker_pb2.Pair(prefill=prefill.ref))
    assert (await router.pair_states.get()).linked
    (link,) = prefill.service._links._links
    prefill.service._links.close(link, "the cable was pulled")
    states = [await router.pair_states.get(), await router.pair_states.get()]
    assert [state.linked for state in states] == [False, True]
    answer = await router.submit(RequestKey("a", 0), [1, 2, 3], sampling(6))
    await answer.done.wait()
    assert answer.token_ids == fake_answer([1, 2, 3], sampling(6))


async def test_a_peer_that_is_not_there_yet_is_dialled_until_unpaired(pair, make_router):
    prefill, decode = await pair.prefill(), await pair.decode()
    router = await make_router(prefill, decode)
    nobody = worker_pb2.PeerRef(worker_id="prefill-9", epoch=1, address="127.0.0.1:1")
    await router.decode.send(pair=worker_pb2.Pair(prefill=nobody))
    state = await router.pair_states.get()
    assert (state.worker_id, state.linked) == ("prefill-9", False)
    assert state.reason == worker_pb2.FAILURE_REASON_PEER_UNREACHABLE
    await router.decode.send(unpair=worker_pb2.Unpair(prefill=nobody))
    await router.decode.send(pair=worker_pb2.Pair(prefill=prefill.ref))
    while (state := await router.pair_states.get()).worker_id == "prefill-9":
        assert not state.linked
    assert state.linked
