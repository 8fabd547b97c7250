"""`python -m router`: the ready line, taken ports, wrong settings, ways to stop, and no heavy imports."""

from __future__ import annotations

import asyncio
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import router
from router.errors import SettingsError
from router.settings import RouterSettings
from router.slo import SloClass

FREE = {"http": "127.0.0.1:0", "grpc": "127.0.0.1:0", "metrics": "127.0.0.1:0", "admin": "127.0.0.1:0"}


def settings_json(checkpoint, **changes):
    return RouterSettings(checkpoint=str(checkpoint), model_name="m", **{**FREE, **changes}).to_json()


async def spawn(settings):
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "router", settings,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("end", ["stdin", "SIGTERM", "SIGINT"])
async def test_it_says_where_it_listens_and_stops_when_told(checkpoint, end):
    process = await spawn(settings_json(checkpoint))
    addresses = json.loads(await process.stdout.readline())
    assert set(addresses) == {"http", "grpc", "metrics", "admin"}
    for address in addresses.values():
        host, port = address.split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.close()
    if end == "stdin":
        process.stdin.close()
    else:
        process.send_signal(getattr(signal, end))
    rest, errors = await asyncio.wait_for(process.communicate(), 10)
    assert (process.returncode, rest) == (0, b""), errors
    assert b"Traceback" not in errors


def threads_of(pid):
    return [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]


@pytest.mark.parametrize("cores", [1, 2])
async def test_with_one_core_its_threads_take_turns(checkpoint, cores):
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < cores:
        pytest.skip(f"{cores} cores are needed")
    os.sched_setaffinity(0, allowed[:cores])
    try:
        process = await spawn(settings_json(checkpoint))
    finally:
        os.sched_setaffinity(0, allowed)
    await process.stdout.readline()
    threads = threads_of(process.pid)
    policies = {os.sched_getscheduler(thread) for thread in threads}
    process.stdin.close()
    await asyncio.wait_for(process.communicate(), 10)
    assert len(threads) > 1
    assert policies == {os.SCHED_BATCH if cores == 1 else os.SCHED_OTHER}


@pytest.mark.parametrize("setting", ["http", "grpc", "metrics", "admin"])
async def test_an_address_that_is_taken(checkpoint, setting):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = await spawn(settings_json(checkpoint, **{setting: address}))
        out, errors = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, out) == (3, b"")
    message = errors.decode()
    assert f"cannot listen on {address} ({setting})" in message
    assert f"router.{setting}" in message
    assert "Traceback" not in message


def test_settings_that_are_wrong(checkpoint, tmp_path):
    for argument, part in (
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "missing settings: checkpoint, model_name"),
        ('{"checkpoint": "x", "model_name": "m", "port": 1}', "unknown settings port"),
        ('{"checkpoint": "x", "model_name": "m", "http": "nowhere"}', "host:port"),
        ('{"checkpoint": "x", "model_name": "m", "liveness_timeout_s": 0}', "greater than 0"),
        ('{"checkpoint": "x", "model_name": "m", "retry_burst": -1}', "at least 0"),
        ('{"checkpoint": "x", "model_name": "m", "max_body_bytes": "big"}', "wrong type"),
        ('{"checkpoint": "x", "model_name": "m", "slo_classes": {"a": {"ttft_s": 1}}}', "tpot_s"),
    ):
        with pytest.raises(SettingsError, match=part):
            RouterSettings.from_json(argument)
    ran = subprocess.run(
        [sys.executable, "-m", "router", settings_json(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert "config.json is missing" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_settings_survive_the_command_line(checkpoint):
    settings = RouterSettings(
        checkpoint="/c",
        model_name="m",
        max_model_len=7,
        slo_classes={"a": SloClass(1.0, 2.0)},
        default_slo_class="a",
    )
    assert RouterSettings.from_json(settings.to_json()) == settings


def test_no_module_of_the_router_imports_torch_or_ray():
    names = [
        name for _, name, _ in pkgutil.walk_packages(router.__path__, "router.") if "__main__" not in name
    ]
    assert len(names) > 20
    code = (
        f"import sys, {', '.join([*names, 'router.__main__'])}; print({{'torch', 'ray'}} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
