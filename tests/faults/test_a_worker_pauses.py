"""SIGSTOP: a worker that is silent for less than the limit is waited for, one that is for longer is lost."""

from __future__ import annotations

import asyncio

import pytest

from tests.faults.harness import LIVENESS_S, Cluster, mixed
from tests.faults.stages import Stage, bring_to, let_go

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", [Stage.PREFILL, Stage.HANDOFF, Stage.DECODE])
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_below_the_limit_nothing_is_lost(cluster: Cluster, role: str, stage: Stage) -> None:
    asks = await bring_to(cluster, stage)
    cluster[f"{role}-0"].pause()
    await asyncio.sleep(LIVENESS_S / 2)
    cluster[f"{role}-0"].go_on()
    await let_go(cluster)
    await cluster.all_is_well(*asks)
    assert cluster.is_up(f"{role}-0")
    assert {ask.finish.details.attempt for ask in asks} == {1}


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_beyond_the_limit_others_go_on(cluster: Cluster, role: str, stage: Stage) -> None:
    """And when it wakes it is the same life with nothing left of what was placed elsewhere."""
    asks = await bring_to(cluster, stage)
    victim = cluster[f"{role}-0"]
    victim.pause()
    victim.dead = True  # for a while: it answers nobody
    await let_go(cluster)
    await asyncio.gather(*(ask.end() for ask in asks))
    await cluster.eventually(lambda: not cluster.is_up(victim.id))
    victim.go_on()
    victim.dead = False
    await let_go(cluster)
    await cluster.register(victim.id)
    await cluster.all_is_well(*asks, *cluster.ask_all(mixed(10, 9)))


async def test_a_life_that_was_replaced_wakes_up(cluster: Cluster) -> None:
    """F7: two lives of one worker at the same time. What the old one says is nobody's business any more."""
    asks = await bring_to(cluster, Stage.DECODE)
    old = {role: cluster[f"{role}-0"] for role in ("prefill", "decode")}
    for worker in old.values():
        worker.pause()
        await cluster.revive(worker.id, port=0)
    asks += cluster.ask_all(mixed(10, 10))
    await asyncio.gather(*(ask.reaches(10) for ask in asks))
    for worker in old.values():
        worker.go_on()
    await cluster.all_is_well(*asks, *cluster.ask_all(mixed(10, 11)))
    for worker in old.values():
        await worker.idle()
