"""Mixed workers in `prelay serve`: beside a prefill worker, which they can do without, and alone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cluster.demo.prompts import demo_prompts
from tests.cluster.asking import LENIENT, status_of, stopped, wrong_answers

if TYPE_CHECKING:
    from tests.cluster.conftest import Server

pytestmark = [pytest.mark.ray, pytest.mark.slow]


async def test_a_mixed_worker_serves_with_a_prefill_worker_and_without(
    start_server: Callable[..., Server],
) -> None:
    server = start_server("--prefill", "1", "--decode", "0", "--mixed", "1", *LENIENT)
    ready = server.ready()
    assert [worker["role"] for worker in ready["workers"]] == ["prefill", "mixed"]
    assert await wrong_answers(ready, demo_prompts()[:8]) == []
    status = await status_of(ready)
    assert all(worker.info.latency for worker in status.workers), "its steps were measured"
    (prefill,) = [worker["pid"] for worker in ready["workers"] if worker["role"] == "prefill"]
    os.kill(prefill, signal.SIGKILL)
    # It takes seconds until there is another one; nobody waits for it.
    assert await wrong_answers(ready, demo_prompts()[8:12]) == []
    await stopped(server, ready)


async def test_mixed_workers_alone_serve_and_stand_in_for_each_other(
    start_server: Callable[..., Server],
) -> None:
    server = start_server(
        "--prefill", "0", "--decode", "0", "--mixed", "2", "--policy", "colocated", *LENIENT
    )
    ready = server.ready()
    assert await wrong_answers(ready, demo_prompts()[:8]) == []
    # Streams that one of them writes go on at the other, word for word.
    prompts = [replace(prompt, max_tokens=200) for prompt in demo_prompts()[:4]]
    answers = asyncio.create_task(wrong_answers(ready, prompts))
    while not (await status_of(ready)).live_requests:  # noqa: ASYNC110
        await asyncio.sleep(0)
    os.kill(ready["workers"][0]["pid"], signal.SIGKILL)
    assert await answers == []
    await stopped(server, ready)
