"""A client that leaves, a deadline that passes: in every state both workers are told at once."""

from __future__ import annotations

import asyncio

import pytest
from prelay.v1 import worker_pb2

from router.errors import DeadlineExceededError
from router.fake_holds import Hold
from router.requests import Outcome

BOTH = {"p0", "d0"}
# State of the request, where it is held, and who is to be told.
STATES = [
    ("gate", None, set()),
    ("reserving", Hold.RESERVE, {"d0"}),
    ("prefilling", Hold.PREFILL, BOTH),
    ("handing_over", Hold.FIRST_TOKEN, BOTH),
    ("waiting_for_kv", Hold.TRANSFER, BOTH),
    ("decoding", Hold.DECODE, BOTH),
    ("paused", None, BOTH),
    ("between_attempts", Hold.DECODE, set()),
]


async def reach(cluster, state, hold, make_request):
    """A request of which the router and both workers agree that it is in that state."""
    live, decode = cluster.router.dispatcher.live, cluster.decode
    holder = cluster.prefill if hold in (Hold.PREFILL, Hold.FIRST_TOKEN) else decode
    if hold is not None:
        holder.hold(hold)
    if state == "gate":
        decode.refuse_pairs(worker_pb2.FAILURE_REASON_PEER_UNREACHABLE, "nobody listens")
        await cluster.until(lambda: not cluster.router.pool.pairs.linked_with("p0"))
    answer = live.submit(make_request(max_tokens=400))
    if state == "paused":
        await decode.until(lambda: decode.paused_requests == 1)
    elif hold is not None:
        await holder.waiting_at(hold)
    if hold is Hold.DECODE:
        await cluster.until(lambda: len(live["r"].record.token_ids) == 2)
    elif hold is Hold.TRANSFER:
        await cluster.until(lambda: len(live["r"].record.token_ids) == 1)
    if state == "between_attempts":
        await decode.kill()
        await cluster.until(lambda: live.gated == 1)
        await cluster.prefill.until(lambda: cluster.prefill.received["cancel"] == 1)
    return answer


def listen(cluster):
    """The names of the workers that are told Cancel from now on."""
    told = set()
    for link in cluster.router.workers.links():

        def send(message, link=link, pass_on=link.send):
            assert message.HasField("cancel")
            told.add(link.worker_id)
            return pass_on(message)

        link.send = send
    return told


@pytest.mark.parametrize("way", ["leaves", "deadline"])
@pytest.mark.parametrize(("state", "hold", "expected"), STATES, ids=[state[0] for state in STATES])
async def test_both_workers_are_told_in_the_same_turn(
    start_cluster, make_request, state, hold, expected, way
):
    cluster = await start_cluster(clock=lambda: 0.0, stream_buffer_tokens=8)
    answer = await reach(cluster, state, hold, make_request)
    told = listen(cluster)
    if way == "leaves":
        cluster.router.dispatcher.live.cancel("r")
        outcome = Outcome.CANCELLED
    else:
        cluster.router.dispatcher.live["r"].timer._run()  # what the event loop does when it is due
        outcome = Outcome.ERROR
    assert told == expected
    assert len(cluster.router.dispatcher.live) == cluster.router.dispatcher.live.gated == 0
    assert cluster.router.dispatcher.live.tally.outcomes == {outcome: 1}
    if way == "deadline":
        if answer.unread_tokens:
            assert (await anext(answer)).finish is None
        with pytest.raises(DeadlineExceededError):
            await anext(answer)
    await cluster.settled()
    # Nothing of it happens later, either.
    cluster.decode.accept_pairs()
    for every in Hold:
        cluster.prefill.let_go(every)
        cluster.decode.let_go(every)
    if state == "between_attempts":
        again = await cluster.add(worker_pb2.ROLE_DECODE, "d0", epoch=2)
        assert again.received["reserve"] == 0
    assert cluster.router.dispatcher.live.tally.outcomes == {outcome: 1}
    await cluster.settled()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("hold", list(Hold))
async def test_an_http_client_that_goes_away_frees_both_workers(cluster, hold, stream):
    holder = cluster.prefill if hold in (Hold.PREFILL, Hold.FIRST_TOKEN) else cluster.decode
    holder.hold(hold)
    payload = {"prompt": "tell me", "max_tokens": 9, "stream": stream, "n": 2}
    async with cluster.http() as http:
        posting = asyncio.create_task(http.post("/v1/completions", json=payload).__aenter__())
        await holder.waiting_at(hold, 2)
        posting.cancel()
        await asyncio.gather(posting, return_exceptions=True)
        if posting.cancelled() is False and posting.exception() is None:
            posting.result().close()
    await cluster.until(lambda: len(cluster.router.dispatcher.live) == 0)
    await cluster.settled()
    assert cluster.router.dispatcher.live.tally.outcomes == {Outcome.CANCELLED: 2}
