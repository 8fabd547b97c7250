"""KV blocks that do not suffice, bursts of short prompts, workers that do not fit: served, or told why."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from router.errors import WorkerRefusedError
from tests.faults.harness import Cluster, Nursery, mixed, prompts, sampling

pytestmark = pytest.mark.slow

SMALL = 24
"""Blocks of a worker that can hold one long sequence, or a few short ones."""


@pytest.fixture
async def small(nursery: Nursery) -> AsyncIterator[Cluster]:
    async with Cluster(nursery) as made:
        await made.add("prefill-0", "prefill-1", "decode-0", "decode-1", num_blocks=SMALL)
        yield made


@pytest.mark.parametrize("victim", [None, "prefill-0", "decode-0"])
async def test_far_more_requests_than_blocks(small: Cluster, victim: str | None) -> None:
    """F2, F15: reservations before prefill, preemptions during inbound transfers; with a death, too."""
    asks = small.ask_all(mixed(60, 23, max_tokens=60, longest=150), deadline_s=60.0)
    if victim is not None:
        await asyncio.gather(*(ask.reaches(1) for ask in asks[:10]))
        await small[victim].kill()
    await small.all_is_well(*asks)
    if victim is None:
        preemptions = [(await w.samples())["prelay_preemptions_total", ""] for w in small.of("decode")]
        assert sum(preemptions) > 0


async def test_clients_leave_while_there_is_no_room(small: Cluster) -> None:
    asks = small.ask_all(mixed(60, 24, max_tokens=60, longest=150), deadline_s=60.0)
    await asyncio.gather(*(ask.reaches(1) for ask in asks[:10]))
    leaving, staying = asks[::2], asks[1::2]
    for ask in leaving:
        ask.leave()
    await small.all_is_well(*staying)
    await asyncio.gather(*(ask.end() for ask in leaving))
    await small.idle()


async def test_a_burst_of_short_prompts(cluster: Cluster) -> None:
    """F21: as many transfers as there are prompts, all at once."""
    asks = cluster.ask_all([(prompt, sampling(3)) for prompt in prompts(400, 25, longest=3)], deadline_s=60.0)
    await cluster.all_is_well(*asks)


async def test_a_worker_that_does_not_fit(cluster: Cluster) -> None:
    """F8: its handshakes fail, again and again; nothing is placed on it, and nobody else notices."""
    await cluster.add("prefill-2", head_dim=16)
    asks = cluster.ask_all(mixed(40, 26))
    await cluster.all_is_well(*asks)
    assert {ask.finish.details.prefill_worker for ask in asks} == {"prefill-0", "prefill-1"}


async def test_an_earlier_life_is_refused(cluster: Cluster) -> None:
    """F7."""
    await cluster["prefill-0"].kill()
    await cluster.revive("prefill-0")
    late = cluster["prefill-0"].spec
    cluster["prefill-0"].spec = type(late)(late.worker_id, late.role, epoch=1)
    with pytest.raises(WorkerRefusedError, match="earlier life"):
        await cluster.register("prefill-0")
    await cluster.all_is_well(*cluster.ask_all(mixed(10, 28)))


async def test_metrics_add_up(cluster: Cluster) -> None:
    """F22: what workers count is what requests say, and the stages are the whole."""
    asks = cluster.ask_all(mixed(20, 29))
    await cluster.all_is_well(*asks)
    decodes = [await worker.samples() for worker in cluster.of("decode")]
    kv_bytes = sum(
        sum(v for (name, _), v in d.items() if name == "prelay_transfer_bytes_total") for d in decodes
    )
    assert kv_bytes == sum(ask.finish.details.kv_bytes for ask in asks) > 0
    sample = cluster.router.registry.get_sample_value
    stages = {stage for ask in asks for stage in ask.finish.details.stages}
    spent = sum(sample("prelay_stage_seconds_sum", {"stage": stage}) or 0.0 for stage in stages)
    lived = sample("prelay_request_duration_seconds_sum", {"slo_class": "default"})
    assert spent == pytest.approx(lived)
    assert lived > 0
