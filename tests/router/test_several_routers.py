"""Two routers in front of the same workers: neither knows what the other does but through the snapshots."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from prelay.v1 import inference_pb2, worker_pb2

from router.fake_holds import Hold
from router.placement import goodput

PREFILL, DECODE, MIXED = worker_pb2.ROLE_PREFILL, worker_pb2.ROLE_DECODE, worker_pb2.ROLE_MIXED
LATENCY = {"step": 0.002, "rows": 0.0002, "decode_context": 1e-7}
POLICIES = ["goodput", "least_loaded"]


@pytest.fixture(autouse=True)
def no_exploring(monkeypatch):
    """Now and then a policy takes another worker than the best."""
    monkeypatch.setattr(goodput, "EXPLORE", 0.0)


async def both(start_cluster, policy, prefills=2, decodes=2, mixed=0, **capacity):
    """Two clusters of one router each, on the same workers, which are those of the first one."""
    first = await start_cluster(policy_name=policy, prefill={"latency": LATENCY}, decode=said(capacity))
    second = await start_cluster(policy_name=policy)
    for worker_id in ("p0", "d0"):
        assert second.router.workers.remove(worker_id, 1)
    await second.fleet.stop()
    second.fleet = first.fleet
    for worker in (first.prefill, first.decode):
        await second.register(worker)
    for number in range(1, prefills):
        await second.register(await first.add(PREFILL, f"p{number}", latency=LATENCY))
    for number in range(1, decodes):
        await second.register(await first.add(DECODE, f"d{number}", **said(capacity)))
    for number in range(mixed):
        await second.register(await first.add(MIXED, f"m{number}", **said(capacity)))
    return first, second


def said(capacity):
    return {"latency": LATENCY, **capacity}


def workers(cluster, role):
    return [one for one in cluster.fleet.workers.values() if one.info.role == role]


async def ask(cluster, prompt, max_tokens):
    sampling = inference_pb2.SamplingParams(max_tokens=max_tokens, temperature=0)
    async with cluster.grpc() as stub:
        call = stub.Generate(inference_pb2.GenerateRequest(text=prompt, sampling=sampling))
        return "".join([message.text async for message in call])


@pytest.mark.parametrize("policy", POLICIES)
async def test_nothing_is_lost_or_mixed_up(start_cluster, policy):
    dice = random.Random(5)
    routers = await both(start_cluster, policy, mixed=1)
    asked = [
        (routers[index % 2], f"prompt {index} " + "x" * dice.randrange(100), dice.randrange(1, 12))
        for index in range(60)
    ]
    texts = await asyncio.gather(*(ask(*one) for one in asked))
    assert texts == [cluster.answer(prompt, max_tokens) for cluster, prompt, max_tokens in asked]
    for cluster in routers:
        await cluster.settled()
        assert cluster.router.dispatcher.live.tally.outcomes == {"good": 30}


@pytest.mark.parametrize("policy", POLICIES)
async def test_each_sees_what_the_other_placed(start_cluster, policy):
    """One router's requests stand on d0 or d1; once a snapshot has told the other, it goes elsewhere."""
    first, second = await both(start_cluster, policy)
    decodes = workers(first, DECODE)
    for worker in decodes:
        worker.hold(Hold.DECODE)
    asking = [asyncio.create_task(ask(first, f"{index}", 5)) for index in range(6)]
    await first.until(lambda: sum(one.live_requests for one in decodes) == 6)
    counts = Counter({one.info.worker_id: one.live_requests for one in decodes})
    # A router by itself spreads them evenly, whatever snapshots say; but for those that are read at once, of
    # which the goodput policy cannot know which one joins a batch first.
    assert min(counts.values()) >= 2
    pool = second.router.pool
    await second.until(lambda: all(pool[name].requests == count for name, count in counts.items()))
    asking += [asyncio.create_task(ask(second, f"more {index}", 5)) for index in range(6)]
    await first.until(lambda: sum(one.live_requests for one in decodes) == 12)
    assert min(one.live_requests for one in decodes) >= 5
    for worker in decodes:
        worker.let_go(Hold.DECODE)
    await asyncio.gather(*asking)


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_block_that_both_count_on_is_given_once(start_cluster, policy):
    """Room for one request at a time: both place one before they hear of each other's. The worker refuses
    the second, which waits until there is room."""
    first, second = await both(start_cluster, policy, prefills=1, decodes=1, num_blocks=2, heartbeat_s=60.0)
    (decode,) = workers(first, DECODE)
    decode.hold(Hold.RESERVE)
    asking = [asyncio.create_task(ask(cluster, "x" * 8, 5)) for cluster in (first, second)]
    await decode.until(lambda: decode.received["reserve"] == 2)
    assert decode.live_requests == 1
    await first.until(lambda: sum(one.router.dispatcher.live.gated for one in (first, second)) == 1)
    assert sum(one.router.pool["d0"].live_requests for one in (first, second)) == 1
    decode.let_go(Hold.RESERVE)
    done, waits = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    assert (len(done), len(waits)) == (1, 1)
    assert decode.received["reserve"] == 2  # no snapshot has said that there is room
    decode.beat_now()
    assert await asyncio.gather(*asking) == [first.answer("x" * 8, 5)] * 2
    await first.settled()


async def test_routers_that_see_the_same_do_not_all_choose_the_same(start_cluster):
    """Goodput tells equals apart at random: of the first requests of two routers, which see an idle pool of
    eight, not all that could meet do. Least loaded always takes the first."""
    met = Counter()
    for policy in POLICIES:
        first, second = await both(start_cluster, policy, decodes=8, heartbeat_s=60.0)
        for round_ in range(10):
            for cluster in (first, second):
                assert await ask(cluster, f"{round_}", 2)
        placed = [one.received["reserve"] for one in workers(first, DECODE)]
        met[policy] = max(placed)
    assert met["least_loaded"] == 20
    assert met["goodput"] <= 10


async def test_a_router_that_goes_leaves_the_other_its_workers(start_cluster):
    first, second = await both(start_cluster, "goodput")
    for worker in workers(first, DECODE):
        worker.hold(Hold.DECODE)
    asking = asyncio.create_task(ask(first, "a", 5))
    await first.until(lambda: any(one.live_requests for one in workers(first, DECODE)))
    leaving = asyncio.create_task(ask(second, "b", 5))
    await first.until(lambda: sum(one.live_requests for one in workers(first, DECODE)) == 2)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await second.router.workers.close()
    await first.until(lambda: sum(one.live_requests for one in workers(first, DECODE)) == 1)
    for worker in workers(first, DECODE):
        worker.let_go(Hold.DECODE)
    assert await asking == first.answer("a", 5)
    await first.settled()
