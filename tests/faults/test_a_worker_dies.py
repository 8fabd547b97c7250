"""kill -9 of either worker of a pair, with requests in every stage: nobody but the operator notices."""

from __future__ import annotations

import asyncio

import pytest

from tests.faults.harness import Cluster, Nursery, mixed
from tests.faults.stages import Stage, bring_to, let_go

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_at_every_stage(cluster: Cluster, role: str, stage: Stage) -> None:
    asks = await bring_to(cluster, stage)
    await cluster[f"{role}-0"].kill()
    await let_go(cluster)
    await cluster.all_is_well(*asks)
    await cluster.revive(f"{role}-0")
    await cluster.all_is_well(*cluster.ask_all(mixed(10, 6)))


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_it_lives_again_before_anybody_has_missed_it(cluster: Cluster, role: str) -> None:
    """F7, F23: the new life has the old one's addresses, and its blocks hold nothing of the old one's."""
    asks = await bring_to(cluster, Stage.PREFILL) + cluster.ask_all(mixed(20, 7))
    await cluster[f"{role}-0"].kill()
    await cluster.revive(f"{role}-0")
    await let_go(cluster)
    await cluster.all_is_well(*asks, *cluster.ask_all(mixed(20, 7)))


async def test_again_and_again_under_one_stream(cluster: Cluster) -> None:
    """F20, F24: each new pair goes on where the last one stopped, and the budget of tokens stays one."""
    await cluster.tell("decode", "pace 0.01")
    asks = cluster.ask_all(mixed(10, 8, max_tokens=120))
    for round_, victim in enumerate(["decode-0", "decode-1"], 1):
        await asyncio.gather(*(ask.reaches(30 * round_) for ask in asks))
        await cluster[victim].kill()
        await asyncio.gather(*(ask.reaches(30 * round_ + 10) for ask in asks))
        await cluster.revive(victim)
    await cluster.all_is_well(*asks)


async def test_with_the_last_token_on_its_way(cluster: Cluster) -> None:
    """F24: neither a token too many nor one that comes twice, however few were left."""
    await cluster.tell("decode", "pace 0.01")
    asks = [cluster.ask(*wish) for length in (2, 3, 4) for wish in mixed(6, length, max_tokens=length)]
    await asyncio.gather(*(ask.reaches(1) for ask in asks))
    await cluster["decode-0"].kill()
    await cluster.all_is_well(*asks)


@pytest.mark.parametrize("backend", ["nixl", "torchdist"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_whatever_brings_the_kv(nursery: Nursery, role: str, backend: str) -> None:
    """F3, F4: the copies of the dead are under way or still to come, through sockets of the backend's own."""
    async with Cluster(nursery) as cluster:
        await cluster.add("prefill-0", "prefill-1", "decode-0", "decode-1", backend=backend)
        await cluster.all_is_well(*cluster.ask_all(mixed(10, 32)))
        asks = await bring_to(cluster, Stage.PREFILL)
        await let_go(cluster)
        await asyncio.gather(*(ask.reaches(1) for ask in asks[:2]))
        await cluster[f"{role}-0"].kill()
        await cluster.all_is_well(*asks)
        await cluster.revive(f"{role}-0")
        await cluster.all_is_well(*cluster.ask_all(mixed(10, 33)))


async def test_both_workers_of_a_pair_at_once(cluster: Cluster) -> None:
    asks = await bring_to(cluster, Stage.DECODE)
    await asyncio.gather(cluster["prefill-0"].kill(), cluster["decode-0"].kill())
    await cluster.all_is_well(*asks)


async def test_a_pool_that_died_out_and_came_back(cluster: Cluster) -> None:
    """F16: new requests are refused at once while there is nobody; streams that had begun are not lost."""
    asks = await bring_to(cluster, Stage.DECODE)
    await asyncio.gather(*(worker.kill() for worker in cluster.of("decode")))
    await cluster.eventually(lambda: not cluster.is_up("decode-0") and not cluster.is_up("decode-1"))
    refused = await cluster.ask([1, 2, 3]).end()
    assert refused.code.name == "UNAVAILABLE"
    assert "decode" in refused.error
    await cluster.revive("decode-0")
    await cluster.all_is_well(*asks)
