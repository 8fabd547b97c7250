"""Disks that are full and descriptors that are gone: what serves goes on serving."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import psutil
import pytest
from prelay.v1 import admin_pb2, admin_pb2_grpc, worker_pb2

from bench.router_stamp import write_checkpoint
from bench.router_workers import LeanWorker, worker_info
from router.settings import RouterSettings
from router.slo import SloClass
from tests.cluster.asking import LENIENT
from tests.cluster.conftest import FREE_PORTS, STOP_LIMIT_S

pytestmark = pytest.mark.slow


async def answer(http: str, model: str) -> str:
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://{http}/v1/completions", json=body) as found,
    ):
        said = await found.json()
        assert found.status == 200, said
        text: str = said["choices"][0]["text"]
        return text


def start_with_a_full_log() -> subprocess.Popen[str]:
    with open("/dev/full", "w") as full:
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "serve", "--json", *FREE_PORTS, *LENIENT],
            stdout=subprocess.PIPE, stderr=full, text=True,
        )  # fmt: skip


@pytest.mark.ray
async def test_a_log_that_cannot_be_written_costs_its_lines_only() -> None:
    process = start_with_a_full_log()
    assert process.stdout is not None
    try:
        ready = json.loads(await asyncio.to_thread(process.stdout.readline))
        text = await answer(ready["http"], ready["model"])
        (pid,) = [worker["pid"] for worker in ready["workers"] if worker["role"] == "decode"]
        os.kill(pid, signal.SIGKILL)  # of which it would say something
        assert await answer(ready["http"], ready["model"]) == text
        tree = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.stdout.close()
        process.send_signal(signal.SIGTERM)
        since = time.monotonic()
    assert await asyncio.to_thread(process.wait, STOP_LIMIT_S) == 0
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in tree):
        assert time.monotonic() - since < STOP_LIMIT_S
        await asyncio.sleep(0.05)


async def attached_workers(admin: str) -> list[LeanWorker]:
    peers: dict[str, LeanWorker] = {}
    async with grpc.aio.insecure_channel(admin) as channel:
        for role in (worker_pb2.ROLE_PREFILL, worker_pb2.ROLE_DECODE):
            worker = LeanWorker(worker_info(role, 0), peers)
            await worker.start()
            peers[worker.info.address] = worker
            worker.pace(0.04, time.monotonic())
            info = worker.info
            request = admin_pb2.RegisterWorkerRequest(
                worker_id=info.worker_id, epoch=info.epoch, role=info.role, address=info.address
            )
            await admin_pb2_grpc.RouterAdminStub(channel).RegisterWorker(request, timeout=20)
    return list(peers.values())


async def answered(http: str, model: str) -> str:
    """The answer that one who asks again and again gets: whoever is turned away hears it at once."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await answer(http, model)
            except aiohttp.ClientOSError:
                await asyncio.sleep(0.05)


async def test_descriptors_that_are_gone_turn_newcomers_away_and_nobody_else(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    free = "127.0.0.1:0"
    settings = RouterSettings(
        checkpoint=str(tmp_path), model_name="bench", http=free, grpc=free, metrics=free, admin=free,
        slo_classes={"default": SloClass(60.0, 60.0)}, liveness_timeout_s=60.0,
    )  # fmt: skip
    limited = 'ulimit -n 120; exec "$0" -P -m router "$1"'
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", limited, sys.executable, settings.to_json(),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    workers: list[LeanWorker] = []
    try:
        addresses = json.loads(await process.stdout.readline())
        workers += await attached_workers(addresses["admin"])
        host, port = addresses["http"].split(":")
        body: dict[str, Any] = {"prompt": "tell me", "max_tokens": 100, "ignore_eos": True}
        body["stream"] = True
        async with (
            asyncio.timeout(60),
            aiohttp.ClientSession() as session,
            session.post(f"http://{addresses['http']}/v1/completions", json=body) as stream,
        ):
            assert stream.status == 200
            first = await stream.content.readline()
            crowd = [await asyncio.open_connection(host, int(port)) for _ in range(200)]
            rest = await stream.content.read()
        assert (first + rest).count(b'"text"') > 20
        assert rest.endswith(b"data: [DONE]\n\n"), "the stream went on to its end"
        for _, writer in crowd:
            writer.close()
        assert await answered(addresses["http"], "bench")
    finally:
        process.terminate()
        _, log = await process.communicate()
        for worker in workers:
            await worker.stop()
    assert process.returncode == 0
    assert b"event=few_descriptors limit=120" in log
