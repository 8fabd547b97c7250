"""Partition, delay, reset and half-open connections between any two: late, never wrong, never stuck."""

from __future__ import annotations

import asyncio
from collections import Counter

import grpc
import pytest

from tests.faults.harness import LEASE_S, LIVENESS_S, OK, Cluster, mixed
from tests.faults.stages import Stage, bring_to, let_go
from transfer.fault_proxy import Direction, Side

pytestmark = pytest.mark.slow

LINK_STAGES = [Stage.PREFILL, Stage.HANDOFF]
"""In these something is under way between the two workers."""


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("direction", [Direction.BACK, Direction.BOTH])
async def test_a_partition_between_router_and_worker(
    cluster: Cluster, direction: Direction, role: str
) -> None:
    """The worker goes on computing what nobody will ever hear of; the streams go on elsewhere."""
    asks = await bring_to(cluster, Stage.DECODE if role == "decode" else Stage.PREFILL)
    cluster[f"{role}-0"].router_side.partition(direction)
    await cluster.tell("prefill", "go")
    asks += cluster.ask_all(mixed(6, 12))
    await asyncio.gather(*(ask.end() for ask in asks))
    await let_go(cluster)
    if not cluster.is_up(f"{role}-0"):
        await cluster.register(f"{role}-0")
    await cluster.all_is_well(*asks, *cluster.ask_all(mixed(10, 13)))


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_that_speaks_and_does_not_hear(cluster: Cluster, role: str) -> None:
    """What no network does to TCP for long (its acknowledgements are cut off as well), but a proxy may.

    Requests that are placed there wait for it, at most until their deadline.
    """
    cluster[f"{role}-0"].router_side.partition(Direction.OUT)
    asks = cluster.ask_all(mixed(8, 12), deadline_s=2.0)
    await asyncio.gather(*(ask.end() for ask in asks))
    await let_go(cluster)
    late = [ask for ask in asks if ask.code is not OK]
    assert len(late) < len(asks)
    await cluster.all_is_well(*(ask for ask in asks if ask.code is OK))
    await cluster.all_is_well(*late, code=grpc.StatusCode.DEADLINE_EXCEEDED)
    await cluster.all_is_well(*cluster.ask_all(mixed(10, 13)))


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_short_partition_between_router_and_worker(cluster: Cluster, role: str) -> None:
    asks = await bring_to(cluster, Stage.PREFILL)
    cluster[f"{role}-0"].router_side.partition()
    await asyncio.sleep(LIVENESS_S / 2)
    await let_go(cluster)
    await cluster.all_is_well(*asks)
    assert {ask.finish.details.attempt for ask in asks} == {1}


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_reset_between_router_and_worker(cluster: Cluster, role: str, stage: Stage) -> None:
    asks = await bring_to(cluster, stage)
    assert cluster[f"{role}-0"].router_side.reset() == 1
    await let_go(cluster)
    await asyncio.gather(*(ask.end() for ask in asks))
    await cluster.register(f"{role}-0")
    await cluster.all_is_well(*asks, *cluster.ask_all(mixed(10, 14)))


@pytest.mark.parametrize("survivor", list(Side))
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_half_open_connection_between_router_and_worker(
    cluster: Cluster, role: str, survivor: Side
) -> None:
    """F9: one of the two believes in a connection that is no more."""
    asks = await bring_to(cluster, Stage.DECODE if role == "decode" else Stage.PREFILL)
    cluster[f"{role}-0"].router_side.half_open(survivor)
    await let_go(cluster)
    await asyncio.gather(*(ask.end() for ask in asks))
    await cluster.eventually(lambda: not cluster.is_up(f"{role}-0"))
    await cluster.register(f"{role}-0")
    await cluster.all_is_well(*asks, *cluster.ask_all(mixed(10, 15)))


async def test_slow_news_does_not_herd_requests(cluster: Cluster) -> None:
    """F25: the router knows what it placed, however old what the workers say is."""
    for worker in cluster.workers.values():
        worker.router_side.delay(0.1)
    asks = cluster.ask_all(mixed(40, 16))
    await cluster.all_is_well(*asks)
    for name in ("prefill_worker", "decode_worker"):
        placed = Counter(getattr(ask.finish.details, name) for ask in asks)
        assert max(placed.values()) <= 26, placed


@pytest.mark.parametrize("stage", LINK_STAGES)
async def test_a_short_partition_between_the_workers(cluster: Cluster, stage: Stage) -> None:
    """Waited for: the leases are longer. F12: the first token has come meanwhile."""
    asks = await bring_to(cluster, stage)
    for worker in cluster.of("prefill"):
        worker.peer_side.partition()
    await cluster.tell("prefill", "go")
    await asyncio.gather(*(ask.reaches(1) for ask in asks))
    await asyncio.sleep(LEASE_S / 4)
    assert {len(ask.tokens) for ask in asks} == {1}
    await let_go(cluster)
    await cluster.all_is_well(*asks)
    assert {ask.finish.details.attempt for ask in asks} == {1}


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("stage", LINK_STAGES)
async def test_a_partition_of_one_prefill_worker(
    cluster: Cluster, stage: Stage, direction: Direction
) -> None:
    """F3: router and worker see each other, but no decode worker sees it: what was on it goes elsewhere."""
    asks = await bring_to(cluster, stage)
    await cluster.tell("prefill", "go")
    cluster["prefill-1"].peer_side.heal()
    cluster["prefill-0"].peer_side.partition(direction)
    asks += cluster.ask_all(mixed(6, 17))
    await asyncio.gather(*(ask.end() for ask in asks))
    await cluster.idle()  # while the partition stands
    await let_go(cluster)
    later = cluster.ask_all(mixed(10, 18))
    await cluster.all_is_well(*asks, *later)


@pytest.mark.parametrize("stage", LINK_STAGES)
async def test_a_reset_between_the_workers(cluster: Cluster, stage: Stage) -> None:
    """F9: and the link heals by itself."""
    asks = await bring_to(cluster, stage)
    assert cluster["prefill-0"].peer_side.reset() >= 1
    await let_go(cluster)
    await cluster.all_is_well(*asks)
    await _serves_again(cluster, "prefill-0")


@pytest.mark.parametrize("survivor", list(Side))
@pytest.mark.parametrize("stage", LINK_STAGES)
async def test_a_half_open_link_between_the_workers(cluster: Cluster, stage: Stage, survivor: Side) -> None:
    asks = await bring_to(cluster, stage)
    cluster["prefill-0"].peer_side.half_open(survivor)
    await let_go(cluster)
    await cluster.all_is_well(*asks)
    await _serves_again(cluster, "prefill-0")


async def test_slow_links_between_the_workers(cluster: Cluster) -> None:
    for worker in cluster.of("prefill"):
        worker.peer_side.delay(0.05)
        worker.peer_side.limit(50_000.0)
    await cluster.all_is_well(*cluster.ask_all(mixed(20, 19)))


async def test_links_that_are_cut_again_and_again(cluster: Cluster) -> None:
    """F8, F9: at any byte, a handshake's included; it concerns the requests that were being handed over."""
    asks = []
    for num_bytes in range(1, 400, 40):
        cluster["prefill-0"].peer_side.cut_after(num_bytes, Direction.BACK)
        asks += cluster.ask_all(mixed(4, num_bytes))
        await asyncio.sleep(0.05)
    await cluster.all_is_well(*asks)
    await _serves_again(cluster, "prefill-0")


async def _serves_again(cluster: Cluster, prefill: str) -> None:
    """Requests are placed on pairs with it, with every decode worker, and come out right."""
    wanted = {(prefill, decode.id) for decode in cluster.of("decode")}
    seen: set[tuple[str, str]] = set()
    async with asyncio.timeout(20):
        while not wanted <= seen:
            asks = cluster.ask_all(mixed(8, len(seen) + 20, max_tokens=5))
            await cluster.all_is_well(*asks)
            seen |= {(a.finish.details.prefill_worker, a.finish.details.decode_worker) for a in asks}
