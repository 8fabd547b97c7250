"""`prelay serve` from outside: right answers by both front ends, under load, with cancellations, after a
death.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import grpc
import pytest
from prelay.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import demo_model_path
from cluster.demo.clients import Answer, DemoClients
from cluster.demo.prompts import DemoPrompt, FrontEnd, demo_prompts
from cluster.demo.reference import compute_references, difference

if TYPE_CHECKING:
    from tests.cluster.conftest import Server

    GenerateCall = grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Ready = dict[str, Any]


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Server]) -> Server:
    # In a class in which nothing is late: what the policy does with requests that are is not tested here.
    return start_server("--slo-class", "batch")


@pytest.fixture(scope="module")
def ready(server: Server) -> Ready:
    return server.ready()


async def test_both_front_ends_answer_like_one_process(ready: Ready) -> None:
    prompts = demo_prompts()[:8]
    async with clients_of(ready) as clients:
        answers = await asyncio.gather(*(clients.ask(prompt, ignore) for prompt in prompts))
    assert differences(answers) == []


async def test_200_requests_at_once_with_cancellations(ready: Ready) -> None:
    rng = random.Random(2)
    blocks_before = await kv_blocks(ready)
    prompts = [
        replace(
            rng.choice(demo_prompts()),
            number=number,
            front_end=rng.choice(list(FrontEnd)),
            seed=rng.choice([None, number]),
            max_tokens=rng.randint(1, 60),
        )
        for number in range(200)
    ]
    async with clients_of(ready) as clients:
        asked = [
            ask_and_leave(clients, prompt, rng.randint(0, 20))
            if rng.random() < 0.4
            else clients.ask(prompt, ignore)
            for prompt in prompts
        ]
        answers = [answer for answer in await asyncio.gather(*asked) if answer is not None]
    assert 100 <= len(answers) < 200
    assert differences(answers) == []
    await eventually(lambda: kv_blocks(ready), blocks_before)


async def test_a_second_serve_on_the_same_ports_is_refused(ready: Ready) -> None:
    command = [sys.executable, "-m", "cluster.cli", "serve", "--grpc", "127.0.0.1:0", "--http", ready["http"]]
    second = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert second.returncode == 3
    assert ready["http"] in second.stderr
    assert "Traceback" not in second.stderr
    async with clients_of(ready) as clients:
        await clients.ask(demo_prompts()[0], ignore)


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_a_killed_worker_comes_back_under_a_new_epoch_and_no_stream_breaks(
    server: Server, ready: Ready, role: str
) -> None:
    before = await status_of(ready, f"{role}-0")
    async with grpc.aio.insecure_channel(ready["grpc"]) as channel:
        undisturbed = await asyncio.gather(*(rest_of(endless_stream(channel, seed)) for seed in range(4)))
        streams = [endless_stream(channel, seed) for seed in range(4)]
        begun = [list((await stream.read()).token_ids) for stream in streams]
        os.kill(before.info.pid, signal.SIGKILL)
        rests = await asyncio.gather(*(rest_of(stream) for stream in streams))
    assert [first + rest for first, rest in zip(begun, rests, strict=True)] == undisturbed

    async def back() -> bool:
        now = await status_of(ready, f"{role}-0")
        return now.up and now.info.epoch > before.info.epoch

    await eventually(back, True)
    prompts = demo_prompts()[:2]
    async with clients_of(ready) as clients:
        answers = [await clients.ask(prompt, ignore) for prompt in prompts]
    assert differences(answers) == []
    assert f"worker {role}-0" in server.log.read_text()


async def test_a_worker_that_paused_serves_again_in_the_same_life(server: Server, ready: Ready) -> None:
    before = await status_of(ready, "decode-0")
    os.kill(before.info.pid, signal.SIGSTOP)

    async def state() -> tuple[bool, int]:
        now = await status_of(ready, "decode-0")
        return now.up, now.info.epoch

    await eventually(state, (False, before.info.epoch))
    os.kill(before.info.pid, signal.SIGCONT)
    await eventually(state, (True, before.info.epoch))
    prompts = demo_prompts()[:2]
    async with clients_of(ready) as clients:
        answers = [await clients.ask(prompt, ignore) for prompt in prompts]
    assert differences(answers) == []
    assert "decode-0" in server.log.read_text()


def test_damaged_weights_are_refused(start_server: Callable[..., Server], tmp_path: Path) -> None:
    model = tmp_path / "damaged"
    shutil.copytree(demo_model_path(), model, ignore=shutil.ignore_patterns("*.py"))
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    server = start_server("--model", str(model))
    assert server.process.wait() == 4
    assert "prelay: error: the model cannot be served" in server.log.read_text()
    assert "Traceback" not in server.log.read_text()
    server.assert_gone(time.monotonic(), None)


def clients_of(ready: Ready) -> DemoClients:
    return DemoClients(ready["http"], ready["grpc"], ready["model"])


async def ask_and_leave(clients: DemoClients, prompt: DemoPrompt, pieces: int) -> None:
    """Cancels the request when so many pieces of its answer have come, if it goes on so long."""
    left = pieces

    def count(text: str) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            task.cancel()

    task = asyncio.create_task(clients.ask(prompt, count))
    if pieces == 0:
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait([task])


def differences(answers: Sequence[Answer]) -> list[str]:
    references = compute_references(
        demo_model_path(), [answer.prompt for answer in answers], lambda done: None
    )
    found = [difference(answer, reference) for answer, reference in zip(answers, references, strict=True)]
    return [what for what in found if what is not None]


async def kv_blocks(ready: Ready) -> dict[tuple[str, str], float]:
    """prelay_kv_blocks by (worker, state), of every worker that the router lists.

    Blocks that only the prefix cache holds count as free: what is left in it depends on what was cancelled.
    """
    blocks: defaultdict[tuple[str, str], float] = defaultdict(float)
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://{ready['metrics']}/targets") as response:
            groups = await response.json(content_type=None)
        for group in groups:
            async with session.get(f"http://{group['targets'][0]}/metrics") as response:
                for family in text_string_to_metric_families(await response.text()):
                    for sample in family.samples:
                        if sample.name == "prelay_kv_blocks":
                            state = sample.labels["state"].replace("cached", "free")
                            blocks[group["labels"]["worker"], state] += sample.value
    return blocks


async def status_of(ready: Ready, worker_id: str) -> admin_pb2.WorkerStatus:
    """What the router knows of a worker; an empty status if nothing."""
    async with grpc.aio.insecure_channel(ready["admin"]) as channel:
        status = await admin_pb2_grpc.RouterAdminStub(channel).GetStatus(admin_pb2.GetStatusRequest())
    found = [worker for worker in status.workers if worker.info.worker_id == worker_id]
    return found[0] if found else admin_pb2.WorkerStatus()


def endless_stream(channel: grpc.aio.Channel, seed: int) -> GenerateCall:
    sampling = inference_pb2.SamplingParams(max_tokens=1000, ignore_eos=True, seed=seed)
    request = inference_pb2.GenerateRequest(text="Once upon a time,", sampling=sampling)
    call: GenerateCall = inference_pb2_grpc.InferenceStub(channel).Generate(request)
    return call


async def rest_of(stream: GenerateCall) -> list[int]:
    """The tokens that are still to come; raises what the call ends with if that is an error."""
    tokens: list[int] = []
    while isinstance(message := await stream.read(), inference_pb2.GenerateResponse):
        tokens += message.token_ids
    return tokens


async def eventually(observe: Callable[[], Any], wanted: object) -> None:
    """Waits until `observe` returns `wanted`; fails with what it last returned."""
    deadline = time.monotonic() + 30
    while (seen := await observe()) != wanted:
        assert time.monotonic() < deadline, f"{seen} is not {wanted}"
        await asyncio.sleep(0.05)


def ignore(text: str) -> None:
    """Not looked at."""
