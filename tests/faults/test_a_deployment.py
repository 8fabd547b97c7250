"""`prelay serve` with two workers of each role: kill -9 and SIGSTOP under real streams, and chaos."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from cluster.demo.clients import Answer
from cluster.demo.prompts import DemoPrompt, FrontEnd
from tests.faults.deployed import (
    SPLIT_IN_TWO,
    TWO_AND_TWO,
    Deployed,
    deployed,
    differences,
    eventually,
    references_of,
    wishes,
)

if TYPE_CHECKING:
    from tests.cluster.conftest import Server

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STREAMS = 12


@pytest.fixture(scope="module")
def ready(start_server: Callable[..., Server]) -> dict[str, Any]:
    return start_server(*TWO_AND_TWO).ready()


@pytest.fixture
async def deployment(ready: dict[str, Any]) -> AsyncIterator[Deployed]:
    async with deployed(ready) as made:
        await made.all_up()
        yield made


async def under_way(deployment: Deployed, prompts: list[DemoPrompt]) -> list[asyncio.Task[Answer]]:
    """The prompts' answers, begun: ten pieces of each have come, on average."""
    wanted = deployment.pieces + 10 * len(prompts)
    tasks = [asyncio.create_task(deployment.ask(prompt)) for prompt in prompts]
    async with asyncio.timeout(60):
        while deployment.pieces < wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return tasks


async def end_well(
    deployment: Deployed, prompts: list[DemoPrompt], tasks: list[asyncio.Task[Answer]]
) -> None:
    """As if nothing had happened."""
    answers = await asyncio.gather(*tasks)
    assert differences(answers, await references_of(prompts)) == []
    await deployment.idle()


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_kill_9(deployment: Deployed, role: str) -> None:
    prompts = wishes(STREAMS, 1, 100, 200)
    tasks = await under_way(deployment, prompts)
    before = await deployment.signal(f"{role}-0", signal.SIGKILL)
    tasks += [asyncio.create_task(deployment.ask(prompt)) for prompt in prompts]
    await asyncio.gather(*tasks)
    await deployment.all_up()
    assert (await deployment.status())[f"{role}-0"].info.epoch > before.info.epoch
    await end_well(deployment, prompts + prompts, tasks)


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_a_short_stop(deployment: Deployed, role: str) -> None:
    """Below the limit nothing is lost, and nothing is placed again."""
    prompts = wishes(STREAMS, 2, 100, 200)
    tasks = await under_way(deployment, prompts)
    before = await deployment.signal(f"{role}-0", signal.SIGSTOP)
    await asyncio.sleep(0.5)
    await deployment.signal(f"{role}-0", signal.SIGCONT)
    await end_well(deployment, prompts, tasks)
    after = (await deployment.status())[f"{role}-0"]
    assert (after.up, after.info.epoch) == (True, before.info.epoch)


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_a_long_stop(deployment: Deployed, role: str) -> None:
    """Beyond the limit the streams go on elsewhere; the worker comes back as the life that it was."""
    prompts = wishes(STREAMS, 3, 100, 200)
    tasks = await under_way(deployment, prompts)
    before = await deployment.signal(f"{role}-0", signal.SIGSTOP)
    await eventually(deployment.up, lambda up: f"{role}-0" not in up, 5.0)
    await asyncio.gather(*tasks)
    await deployment.signal(f"{role}-0", signal.SIGCONT)
    await deployment.all_up()
    assert (await deployment.status())[f"{role}-0"].info.epoch == before.info.epoch
    await end_well(deployment, prompts, tasks)


async def test_kill_9_of_one_rank(start_server: Callable[..., Server]) -> None:
    """The worker dies as a whole, and lives again as a whole. It was the only one of its role: its streams
    wait for it."""
    ready = start_server(*SPLIT_IN_TWO).ready()
    async with deployed(ready) as deployment:
        prompts = wishes(STREAMS, 6, 100, 200)
        tasks = await under_way(deployment, prompts)
        before = (await deployment.status())["decode-0"].info
        _rank_of(before.pid).kill()
        await asyncio.gather(*tasks)
        await deployment.all_up()
        assert (await deployment.status())["decode-0"].info.epoch > before.epoch
        await end_well(deployment, prompts, tasks)


def _rank_of(worker_pid: int) -> psutil.Process:
    """A rank of the worker beside its first, which is the worker's own process."""
    children = psutil.Process(worker_pid).children(recursive=True)
    return next(child for child in children if "engine.parallel" in " ".join(child.cmdline()))


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("requests", "every_s", "at_once"), [(1000, 5.0, 24)])
async def test_chaos(deployment: Deployed, requests: int, every_s: float, at_once: int) -> None:
    """A worker is killed every few seconds, prefill and decode in turn, never the last that is up of its
    role; the launcher starts it again. All streams complete, and all are what they would have been."""
    rng = random.Random(4)
    distinct = wishes(48, 5, 80, 200)
    references = await references_of(distinct)
    order = [rng.randrange(len(distinct)) for _ in range(requests)]
    room = asyncio.Semaphore(at_once)

    async def one(which: int) -> Answer:
        async with room:
            return await deployment.ask(replace(distinct[which], front_end=rng.choice(list(FrontEnd))))

    killing = asyncio.create_task(_kill_every(deployment, every_s))
    began = time.monotonic()
    answers = await asyncio.gather(*map(one, order))
    lasted_s = time.monotonic() - began
    killing.cancel()
    kills = (await asyncio.gather(killing, return_exceptions=True))[0]
    assert isinstance(kills, int), kills
    print(f"{requests} requests in {lasted_s:.0f} s, {kills} workers killed")
    assert kills >= lasted_s / every_s / 3
    assert differences(answers, [references[which] for which in order]) == []
    await deployment.all_up()
    await deployment.idle()


async def _kill_every(deployment: Deployed, every_s: float) -> int:
    """Until it is cancelled; how many it has killed."""
    kills = 0
    try:
        for victim in itertools.cycle(("prefill-0", "decode-0", "prefill-1", "decode-1")):
            await asyncio.sleep(every_s)
            role, _, index = victim.partition("-")
            both = {victim, f"{role}-{1 - int(index)}"}
            await eventually(deployment.up, lambda up, both=both: both <= up, 60.0)
            await deployment.signal(victim, signal.SIGKILL)
            kills += 1
    except asyncio.CancelledError:
        return kills
    raise AssertionError("unreachable")
