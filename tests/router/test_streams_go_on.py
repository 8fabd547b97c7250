"""A worker is lost, or fails, at any point: the client gets the very answer that it would have got."""

from __future__ import annotations

import asyncio
import json
import random

import grpc
import grpc.aio
import pytest
from prelay.v1 import inference_pb2, worker_pb2

from router.fake_holds import Hold
from router.requests import Outcome, Stage

PROMPT = "tell me"
PREFILL, DECODE = worker_pb2.ROLE_PREFILL, worker_pb2.ROLE_DECODE
REASON = worker_pb2.FailureReason


async def ask(cluster, prompt=PROMPT, max_tokens=9):
    """(status code or None, message or text, finish) of one gRPC call."""
    sampling = inference_pb2.SamplingParams(max_tokens=max_tokens, temperature=0)
    async with cluster.grpc() as stub:
        call = stub.Generate(inference_pb2.GenerateRequest(text=prompt, sampling=sampling))
        try:
            messages = [message async for message in call]
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details(), None
    return None, "".join(message.text for message in messages), messages[-1].finish


async def collect(call):
    return [message async for message in iter_reads(call)]


async def iter_reads(call):
    while (message := await call.read()) is not grpc.aio.EOF:
        yield message


def holder(cluster, hold):
    return cluster.prefill if hold in (Hold.PREFILL, Hold.FIRST_TOKEN) else cluster.decode


def stages_add_up(finish):
    stages = sum(value.ToNanoseconds() for value in finish.details.stages.values())
    return stages == pytest.approx(finish.details.duration.ToNanoseconds(), abs=20)


@pytest.mark.parametrize("hold", list(Hold))
@pytest.mark.parametrize("victim", ["p0", "d0"])
async def test_a_lost_worker_is_a_pause(cluster, hold, victim):
    await cluster.add(PREFILL, "p1")
    await cluster.add(DECODE, "d1")
    holder(cluster, hold).hold(hold)
    asking = asyncio.create_task(ask(cluster))
    await holder(cluster, hold).waiting_at(hold)
    (live,) = cluster.router.dispatcher.live
    if hold in (Hold.TRANSFER, Hold.DECODE):
        await cluster.until(lambda: len(live.record.token_ids) == (2 if hold is Hold.DECODE else 1))
    emitted = len(live.record.token_ids)
    lost = cluster.prefill if victim == "p0" else cluster.decode
    lost.break_stream()
    await cluster.until(lambda: not cluster.router.pool[victim].up)
    holder(cluster, hold).let_go(hold)
    code, text, finish = await asking
    assert (code, text) == (None, cluster.answer(PROMPT, 9))
    assert finish.usage.completion_tokens == 9
    assert stages_add_up(finish)
    if (hold, victim) == (Hold.DECODE, "p0"):  # the prefill worker had done its part
        assert finish.details.attempt == 1
    else:
        again = next(worker for worker in cluster.fleet.workers.values() if worker.reserves[-1:] and (
            worker.reserves[-1].attempt == 2))  # fmt: skip
        assert again.reserves[-1].num_output_tokens == emitted
        assert again.reserves[-1].sampling.max_tokens == 9
        assert finish.details.attempt == 2
        assert cluster.sample("prelay_recoveries_total", cause="worker_lost") == 1
        assert cluster.sample("prelay_recovered_streams_total") == (emitted > 0)
        assert (finish.details.stages["recovery"].ToNanoseconds() > 0) == (emitted > 0)
        assert (finish.details.stages["handoff_retry"].ToNanoseconds() > 0) == (emitted == 0)
        assert cluster.sample("prelay_request_attempts_sum") == 2
    await cluster.settled()


@pytest.mark.parametrize("victim", ["p0", "d0"])
async def test_the_only_worker_of_a_role_comes_back(cluster, victim):
    """What was sent before it was lost is not sent again, also when it is lost twice."""
    holder_of = cluster.decode
    lost = cluster.prefill if victim == "p0" else cluster.decode
    hold = Hold.TRANSFER if victim == "p0" else Hold.DECODE
    holder_of.hold(hold)
    asking = asyncio.create_task(ask(cluster))
    for epoch in (2, 3):
        await holder_of.waiting_at(hold)
        (live,) = cluster.router.dispatcher.live
        await cluster.until(lambda live=live, epoch=epoch: len(live.record.token_ids) >= epoch - 1)
        await lost.kill()
        await cluster.until(lambda: cluster.router.dispatcher.live.gated == 1)
        lost = await cluster.fleet.start(lost.info.role, victim, epoch=epoch)
        if victim == "d0":
            holder_of = lost
            if epoch == 2:
                lost.hold(hold)
        await cluster.register(lost)
    holder_of.let_go(hold)
    code, text, finish = await asking
    assert (code, text, finish.details.attempt) == (None, cluster.answer(PROMPT, 9), 3)
    assert stages_add_up(finish)
    await cluster.settled()


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        (REASON.FAILURE_REASON_PEER_UNREACHABLE, "peer_unreachable"),
        (REASON.FAILURE_REASON_TRANSFER_FAILED, "transfer_failed"),
        (REASON.FAILURE_REASON_LEASE_EXPIRED, "lease_expired"),
        (REASON.FAILURE_REASON_INTERNAL, "internal"),
    ],
)
async def test_a_hand_off_that_fails_is_tried_elsewhere(cluster, reason, cause):
    await cluster.add(DECODE, "d1")
    cluster.decode.fail_handoffs(reason)
    code, text, finish = await ask(cluster)
    assert (code, text) == (None, cluster.answer(PROMPT, 9))
    assert (finish.details.decode_worker, finish.details.attempt) == ("d1", 2)
    assert cluster.sample("prelay_recoveries_total", cause=cause) == 1
    await cluster.settled()


async def test_what_can_never_be_served_is_not_tried_again(cluster):
    cluster.decode.fail_next(REASON.FAILURE_REASON_INVALID)
    code, message, _ = await ask(cluster)
    assert (code, message) == (grpc.StatusCode.INVALID_ARGUMENT, "worker d0: invalid")
    assert cluster.decode.received["reserve"] == 1
    await cluster.settled()


async def test_a_request_that_kills_its_workers_ends(start_cluster):
    cluster = await start_cluster(max_attempts=3)
    cluster.decode.fail_next(*[REASON.FAILURE_REASON_INTERNAL] * 3)
    code, message, _ = await ask(cluster)
    assert code is grpc.StatusCode.INTERNAL
    assert (
        message == "worker d0: internal; failed attempts of this request: 3, the limit (router.max_attempts)"
    )
    assert (await ask(cluster))[1] == cluster.answer(PROMPT, 9)
    assert cluster.decode.received["reserve"] == 4
    await cluster.settled()


async def test_no_room_is_no_failed_attempt(start_cluster):
    cluster = await start_cluster(max_attempts=2)
    cluster.decode.fail_next(*[REASON.FAILURE_REASON_NO_BLOCKS] * 3, REASON.FAILURE_REASON_INTERNAL)
    _, text, finish = await ask(cluster)
    assert (text, finish.details.attempt) == (cluster.answer(PROMPT, 9), 5)


async def test_what_no_prefill_worker_can_read_any_more_ends_and_keeps_nobody_waiting(start_cluster):
    """Prompt and answer so far exceed the prefill workers' KV caches, which are smaller than the decode
    workers'."""
    cluster = await start_cluster(prefill={"num_blocks": 2})
    cluster.decode.hold(Hold.DECODE)
    asking = asyncio.create_task(ask(cluster, "p" * 31))
    await cluster.decode.waiting_at(Hold.DECODE)
    (live,) = cluster.router.dispatcher.live
    await cluster.until(lambda: len(live.record.token_ids) == 2)
    await cluster.decode.fail_running(REASON.FAILURE_REASON_INTERNAL)
    cluster.decode.let_go(Hold.DECODE)
    assert (await ask(cluster))[1] == cluster.answer(PROMPT, 9)
    code, message, _ = await asking
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "the 31 tokens of the prompt and the 2 of the answer so far need 3 KV blocks" in message
    await cluster.settled()


async def test_a_cluster_that_collapses_is_not_given_its_load_again(start_cluster):
    cluster = await start_cluster(retry_budget=0, retry_burst=2)
    cluster.decode.hold(Hold.TRANSFER)
    asking = [asyncio.create_task(ask(cluster, prompt)) for prompt in "abcde"]
    await cluster.decode.waiting_at(Hold.TRANSFER, 5)
    cluster.decode.break_stream()
    await cluster.until(lambda: not cluster.router.pool["d0"].up)
    cluster.decode.let_go(Hold.TRANSFER)
    await cluster.register(cluster.decode)
    answers = await asyncio.gather(*asking)
    errors = [message for code, message, _ in answers if code is grpc.StatusCode.UNAVAILABLE]
    assert len(errors) == 3
    assert all("too many requests have lost their workers" in message for message in errors)
    assert sum(code is None for code, _, _ in answers) == 2
    await cluster.settled()


async def test_live_requests_wait_for_a_worker_and_new_ones_do_not(start_cluster):
    cluster = await start_cluster(recovery_wait_s=0.2)
    cluster.decode.hold(Hold.DECODE)
    async with cluster.grpc() as stub:
        sampling = inference_pb2.SamplingParams(max_tokens=9, temperature=0)
        call = stub.Generate(inference_pb2.GenerateRequest(text=PROMPT, sampling=sampling))
        first = await call.read()
        await cluster.decode.waiting_at(Hold.DECODE)
        await cluster.decode.kill()
        await cluster.until(lambda: cluster.router.dispatcher.live.gated == 1)
        code, message, _ = await ask(cluster)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "no decode worker is up" in message
        assert cluster.router.dispatcher.live.gated == 1
        with pytest.raises(grpc.aio.AioRpcError, match="no decode worker is up") as caught:
            await collect(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert first.text == cluster.answer(PROMPT, 9)[: len(first.text)]
    await cluster.add(DECODE, "d1")
    assert (await ask(cluster))[1] == cluster.answer(PROMPT, 9)
    await cluster.settled()


async def test_what_is_placed_again_goes_ahead_of_what_came_later(start_cluster):
    cluster = await start_cluster(decode={"num_blocks": 2})
    cluster.decode.hold(Hold.TRANSFER)
    first = asyncio.create_task(ask(cluster, "first"))
    await cluster.decode.waiting_at(Hold.TRANSFER)
    second = asyncio.create_task(ask(cluster, "second"))
    await cluster.until(lambda: cluster.router.dispatcher.live.gated == 1)
    cluster.decode.break_stream()
    await cluster.until(lambda: cluster.router.dispatcher.live.gated == 2)
    cluster.decode.let_go(Hold.TRANSFER)
    await cluster.register(cluster.decode)
    assert (await first)[1] == cluster.answer("first", 9)
    assert (await second)[1] == cluster.answer("second", 9)
    prompts = [bytes(one.token_ids[: len(one.token_ids) - one.num_output_tokens]) for one in (
        cluster.decode.reserves)]  # fmt: skip
    assert prompts == [b"first", b"first", b"second"]


async def test_tokens_that_came_early_are_thrown_away_with_their_placement(cluster):
    """The decode worker overtakes the first token, and then the prefill worker is lost."""
    await cluster.add(PREFILL, "p1")
    cluster.prefill.hold(Hold.FIRST_TOKEN)
    asking = asyncio.create_task(ask(cluster))
    await cluster.prefill.waiting_at(Hold.FIRST_TOKEN)
    await cluster.decode.until(lambda: cluster.decode.reserves and not cluster.decode.live_requests)
    cluster.prefill.break_stream()
    _, text, finish = await asking
    assert (text, finish.details.attempt) == (cluster.answer(PROMPT, 9), 2)
    assert cluster.decode.reserves[-1].num_output_tokens == 0
    await cluster.settled()


async def test_a_prefill_worker_that_is_lost_before_its_token_of_a_later_placement(cluster):
    """The client has tokens, and the decode worker sends some, but between them one is missing."""
    d1 = await cluster.add(DECODE, "d1")
    cluster.decode.hold(Hold.DECODE)
    asking = asyncio.create_task(ask(cluster))
    await cluster.decode.waiting_at(Hold.DECODE)
    (live,) = cluster.router.dispatcher.live
    await cluster.until(lambda: len(live.record.token_ids) == 2)
    cluster.prefill.hold(Hold.FIRST_TOKEN)
    d1.hold(Hold.DECODE)
    cluster.decode.break_stream()
    await d1.waiting_at(Hold.DECODE)
    await cluster.until(lambda: live.decoding)
    assert len(live.record.token_ids) == 2
    cluster.prefill.break_stream()
    await cluster.until(lambda: not cluster.router.pool["p0"].up)
    cluster.prefill.let_go(Hold.FIRST_TOKEN)
    d1.let_go(Hold.DECODE)
    await cluster.register(cluster.prefill)
    _, text, finish = await asking
    assert (text, finish.details.attempt) == (cluster.answer(PROMPT, 9), 3)
    await cluster.settled()


def beat(link):
    return link.last_snapshot.seq if link.last_snapshot else 0


async def test_a_frozen_worker_is_left_and_what_it_says_later_is_ignored(start_cluster):
    now = [0.0]
    cluster = await start_cluster(clock=lambda: now[0], liveness_timeout_s=6.0)
    d1 = await cluster.add(DECODE, "d1")
    cluster.decode.hold(Hold.DECODE)
    d1.hold(Hold.DECODE)
    asking = asyncio.create_task(ask(cluster))
    await cluster.decode.waiting_at(Hold.DECODE)
    cluster.decode.freeze()
    alive = [link for link in cluster.router.workers.links() if link.worker_id != "d0"]
    while cluster.router.pool["d0"].up:
        seen = [beat(link) for link in alive]
        await cluster.until(
            lambda seen=seen: all(beat(link) > last for link, last in zip(alive, seen, strict=True))
        )
        now[0] += 1.0
        cluster.router.workers.watch()
    await d1.waiting_at(Hold.DECODE)
    cluster.decode.let_go(Hold.DECODE)
    cluster.decode.thaw()
    d1.let_go(Hold.DECODE)
    _, text, finish = await asking
    assert (text, finish.details.decode_worker) == (cluster.answer(PROMPT, 9), "d1")
    await cluster.settled()


def shape(body):
    """A response without what differs from call to call."""
    return json.loads(json.dumps(body), object_hook=lambda item: {
        name: value for name, value in item.items() if name not in ("id", "created", "prelay")})  # fmt: skip


PAYLOADS = [
    {"prompt": PROMPT, "n": 3, "seed": 7, "logprobs": 2, "prompt_logprobs": 1, "max_tokens": 12},
    {"prompt": ["one", "two"], "echo": True, "logprobs": 1, "max_tokens": 7},
    {"prompt": PROMPT, "max_tokens": 40, "min_tokens": 10, "stop": ["STOP"]},
]


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("reason", ["lost", "failed"])
async def test_choices_logprobs_stop_strings_and_budgets_are_as_if_nothing_had_happened(
    cluster, payload, reason
):
    if "stop" in payload:
        answer = cluster.answer(PROMPT, 40)
        payload = {**payload, "stop": [answer[3:5], answer[20:23]]}
    async with cluster.http() as http:
        async with http.post("/v1/completions", json=payload) as response:
            expected = shape(await response.json())
        await cluster.add(DECODE, "d1")
        for _ in range(4):
            cluster.decode.hold(Hold.DECODE)
            asking = asyncio.create_task(http.post("/v1/completions", json=payload).__aenter__())
            await cluster.decode.waiting_at(Hold.DECODE)
            if reason == "failed":
                await cluster.decode.fail_running(REASON.FAILURE_REASON_INTERNAL)
            else:
                cluster.decode.break_stream()
                await cluster.until(lambda: not cluster.router.pool["d0"].up)
            cluster.decode.let_go(Hold.DECODE)
            response = await asking
            assert shape(await response.json()) == expected
            await cluster.register(cluster.decode)
        await cluster.settled()
    for worker in cluster.fleet.workers.values():
        for command in (*worker.reserves, *worker.prefills):
            if command.num_output_tokens:
                assert not command.sampling.HasField("prompt_logprobs")
    assert cluster.router.dispatcher.live.tally.outcomes[Outcome.ERROR] == 0


async def test_many_streams_through_a_storm(start_cluster):
    """Workers fail, break and come back while fifty answers are on their way."""
    cluster = await start_cluster(max_attempts=1000, retry_burst=100_000)
    workers = [
        cluster.prefill, cluster.decode, await cluster.add(PREFILL, "p1"), await cluster.add(DECODE, "d1"),
    ]  # fmt: skip
    rng = random.Random(4)
    prompts = [f"request {number}" for number in range(50)]
    asking = [asyncio.create_task(ask(cluster, prompt, 10 + at % 30)) for at, prompt in enumerate(prompts)]
    for _ in range(25):
        victim = rng.choice(workers)
        if rng.random() < 0.5:
            victim.fail_next(rng.choice([REASON.FAILURE_REASON_INTERNAL, REASON.FAILURE_REASON_NO_BLOCKS]))
            victim.fail_handoffs(REASON.FAILURE_REASON_TRANSFER_FAILED)
        victim.break_stream()
        await cluster.until(lambda victim=victim: not cluster.router.pool[victim.info.worker_id].up)
        await cluster.register(victim)
        for _ in range(rng.randrange(200)):
            await asyncio.sleep(0)
    answers = await asyncio.gather(*asking)
    assert [text for _, text, _ in answers] == [
        cluster.answer(prompt, 10 + at % 30) for at, prompt in enumerate(prompts)
    ]
    assert all(stages_add_up(finish) for _, _, finish in answers)
    assert cluster.router.dispatcher.live.tally.outcomes == {Outcome.GOOD: 50}
    assert sum(cluster.sample("prelay_recoveries_total", cause=cause) for cause in ("worker_lost",)) > 10
    assert cluster.sample("prelay_stage_seconds_count", stage=Stage.RECOVERY) == 50
    await cluster.settled()


@pytest.mark.parametrize("leaves", [True, False])
async def test_a_request_that_waits_between_attempts(start_cluster, make_request, leaves):
    cluster = await start_cluster(clock=lambda: 0.0)
    live = cluster.router.dispatcher.live
    cluster.decode.fail_next(*[REASON.FAILURE_REASON_INTERNAL] * 2)
    live.submit(make_request(max_tokens=3))
    await cluster.until(lambda: live["r"].pause is not None)
    assert live.gated == 0
    request = live["r"]
    if leaves:
        live.cancel("r")
        assert request.pause.cancelled()
    await cluster.until(lambda: len(live) == 0)
    assert live.tally.outcomes == {Outcome.CANCELLED if leaves else Outcome.GOOD: 1}
    assert cluster.decode.received["reserve"] == (2 if leaves else 3)
    await cluster.settled()
