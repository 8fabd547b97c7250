"""`model.load: simulated`: many workers on few cores, with all but the arithmetic real."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from prelay.v1 import inference_pb2, inference_pb2_grpc

from engine.fake import fake_answer
from engine.sequence import TokenSampling

if TYPE_CHECKING:
    from tests.cluster.conftest import Server


def test_nothing_that_a_simulated_worker_imports_takes_torch() -> None:
    modules = (
        "cluster.host, cluster.host_engine, decode_worker.servicer, prefill_worker.servicer, engine.config, "
        "engine.simulated, transfer.ipc, transfer.digest"
    )
    script = f"import sys, {modules}\nprint('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.ray
@pytest.mark.slow
async def test_answers_are_those_that_fake_engines_give(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"version": 1, "coefficients": {"step": 0.002, "rows": 0.00001}}))
    server = start_server(
        "--set", "model.load=simulated",
        "--set", f"model.profile={profile}",
        "--set", "transfer.digest_share=1",
        "--prefill", "3",
        "--decode", "2",
        "--mixed", "1",
        "--slo-class", "batch",
    )  # fmt: skip
    ready = server.ready()
    assert len(ready["workers"]) == 6
    rng = random.Random(0)

    async def one(stub: inference_pb2_grpc.InferenceStub) -> None:
        prompt, length = [rng.randrange(3, 2000) for _ in range(rng.randint(1, 600))], rng.randint(1, 20)
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=prompt),
            sampling=inference_pb2.SamplingParams(max_tokens=length, temperature=0, ignore_eos=True),
        )
        answer = [token async for message in stub.Generate(request) for token in message.token_ids]
        assert answer == fake_answer(prompt, TokenSampling(0.0, 0, 1.0, 0, length, 0, frozenset()))

    async with grpc.aio.insecure_channel(ready["grpc"]) as channel:
        await asyncio.gather(*(one(inference_pb2_grpc.InferenceStub(channel)) for _ in range(60)))
    since = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(server.assert_gone, since, ready)
