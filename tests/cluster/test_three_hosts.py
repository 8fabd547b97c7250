"""Three hosts with a network between them, which are network namespaces of this one: router and Ray's head on
the first, prefill on the second, decode on the third."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import aiohttp
import psutil
import pytest

from cluster.demo.prompts import demo_prompts
from tests.cluster.asking import status_of, wrong_answers

_BRIDGE = "prelaybr0"
_OURS = "10.77.0.254"
_PORT = 6379
DEPLOY = Path(__file__).parent.parent.parent / "deploy" / "ray"
_NAMES = ("front", "prefill", "decode")


def _why_no_hosts() -> str | None:
    """Why none can be made here, if so."""
    if os.geteuid() != 0:
        return "network namespaces are made by root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "ip and tc (iproute2) are not installed"
    made = subprocess.run(["ip", "netns", "add", "prelay-probe"], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "prelay-probe"], check=True)
    return None


pytestmark = [pytest.mark.netns, pytest.mark.ray, pytest.mark.slow]


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


@dataclass
class Host:
    """name: of its namespace, and the role of its workers. address: in the network between them."""

    name: str
    address: str
    folder: Path
    processes: list[subprocess.Popen[Any]] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        return f"prelay-{self.name}"

    @property
    def wire(self) -> str:
        """Our end of its cable."""
        return f"pw-{self.name}"

    def connect(self) -> None:
        inside = f"pi-{self.name}"
        _ip("netns", "add", self.namespace)
        _ip("link", "add", self.wire, "type", "veth", "peer", "name", inside, "netns", self.namespace)
        _ip("link", "set", self.wire, "master", _BRIDGE, "up")
        for command in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{self.address}/24", "dev", inside),
            ("link", "set", inside, "up"),
        ):
            _ip("-n", self.namespace, *command)

    def cut(self, *, is_cut: bool) -> None:
        _ip("link", "set", self.wire, "down" if is_cut else "up")

    def slow_down(self, rate: str) -> None:
        """What comes to it."""
        subprocess.run(
            ["tc", "qdisc", "replace", "dev", self.wire, "root", "tbf", "rate", rate, "burst", "256kb",
             "latency", "50ms"],
            check=True,
        )  # fmt: skip

    def run(self, *command: str, stdout: int | IO[Any] | None = None) -> subprocess.Popen[Any]:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "of-three-hosts-under-test-and-long-enough",
            "GRPC_VERBOSITY": "ERROR",
            "UCX_TLS": "tcp",  # or NIXL would see that it is one host, and pass by the network
        }
        with (self.folder / f"{self.name}-{len(self.processes)}.log").open("w") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *command],
                stdin=subprocess.DEVNULL,
                stdout=log if stdout is None else stdout,
                stderr=log,
                env=environment,
                text=True,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def start_ray(self, head: Host, temp: Path, *more: str) -> None:
        """By the script that operators use."""
        role = ("head",) if head is self else (self.name, f"{head.address}:{_PORT}")
        options = ("--num-cpus=0", f"--temp-dir={temp}") if head is self else ("--num-cpus=1", *more)
        self.run(
            str(DEPLOY / "launch.sh"), *role, "--", *options, f"--node-ip-address={self.address}",
            "--object-store-memory=100000000", "--block",
        )  # fmt: skip

    def kill(self) -> None:
        """Everything that runs on it, at once."""
        found = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Sequence[Host]]:
    if (reason := _why_no_hosts()) is not None:
        pytest.skip(reason)
    made = [Host(name, f"10.77.0.{number}", tmp_path) for number, name in enumerate(_NAMES, start=1)]
    _remove(made)
    _ip("link", "add", _BRIDGE, "type", "bridge")
    _ip("addr", "add", f"{_OURS}/24", "dev", _BRIDGE)
    _ip("link", "set", _BRIDGE, "up")
    for host in made:
        host.connect()
    yield made
    for host in reversed(made):
        host.kill()
    for host in made:
        for process in host.processes:
            process.wait(10)
            if process.stdout is not None:
                process.stdout.close()
    _remove(made)


def _remove(made: Sequence[Host]) -> None:
    for host in made:
        host.kill()
        _ip("netns", "del", host.namespace, check=False)
        _ip("link", "del", host.wire, check=False)
    _ip("link", "del", _BRIDGE, check=False)


def _wait_for_nodes(head: Host, count: int) -> None:
    """Until so many nodes of the Ray cluster are alive."""
    script = (
        "import ray, sys, time\n"
        f"ray.init('{head.address}:{_PORT}', log_to_driver=False, configure_logging=False)\n"
        f"while sum(n['Alive'] for n in ray.nodes()) < {count}: time.sleep(0.2)\n"
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if head.run(sys.executable, "-c", script).wait(60) == 0:
            return
        time.sleep(0.5)
    raise AssertionError("the Ray cluster does not come up")


def _serve(front: Host, *settings: str) -> tuple[subprocess.Popen[Any], dict[str, Any]]:
    listeners = [
        f for name in ("http", "grpc", "metrics", "admin") for f in (f"--{name}", f"{front.address}:0")
    ]
    process = front.run(
        sys.executable, "-m", "cluster.cli", "serve", str(DEPLOY / "serve.yaml"), "--json", *listeners,
        "--ray-address", f"{front.address}:{_PORT}", "--slo-class", "batch",
        *(word for setting in settings for word in ("--set", setting)), stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, [log.read_text()[-2000:] for log in front.folder.glob("front-*.log")]
    return process, json.loads(line)


@pytest.mark.parametrize("backend", ["torchdist", "nixl"])
async def test_prefill_and_decode_on_hosts_of_their_own(hosts: Sequence[Host], backend: str) -> None:
    """With nixl a second decode worker is on the prefill worker's host."""
    is_near_too = backend == "nixl"
    if is_near_too:
        pytest.importorskip("nixl")
    front, prefill, decode = hosts
    temp = Path("/tmp") / f"prelay-hosts-{os.getpid()}"
    near = ("--num-cpus=2", '--resources={"prefill": 1000, "decode": 1}')
    try:
        # One after the other: they share a file system, and so Ray's session folder.
        for count, host in enumerate(hosts, start=1):
            host.start_ray(front, temp, *(near if is_near_too and host is prefill else ()))
            _wait_for_nodes(front, count)
        serving, ready = _serve(
            front, f"transfer.backend={backend}", f"decode.replicas={2 if is_near_too else 1}"
        )
        where = {(one["role"], one["address"].rpartition(":")[0]) for one in ready["workers"]}
        apart = {("prefill", prefill.address), ("decode", decode.address)}
        assert where == apart | ({("decode", prefill.address)} if is_near_too else set())
        prompts = demo_prompts()[:8]
        assert await wrong_answers(ready, prompts) == []
        # A hundred megabits are slower, and as right.
        for host in (prefill, decode):
            host.slow_down("100mbit")
        assert await wrong_answers(ready, prompts) == []
        if is_near_too:
            decode.slow_down("20mbit")
            await _prefer_the_near_pair(ready, prefill)
        else:
            await _outlive_faults(ready, prefill, decode, lambda: prefill.start_ray(front, temp))
        serving.terminate()
        for pid in [p.pid for p in psutil.Process(serving.pid).children(recursive=True)]:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGTERM)
        serving.wait(20)
    finally:
        for host in hosts:
            host.kill()
        shutil.rmtree(temp, ignore_errors=True)


async def _prefer_the_near_pair(ready: dict[str, Any], prefill: Host) -> None:
    """A prompt of 900 tokens is five megabytes, or two seconds for those twenty megabits."""
    near = {
        one["worker_id"]
        for one in ready["workers"]
        if one["role"] == "decode" and one["address"].startswith(f"{prefill.address}:")
    }
    took: list[str] = []
    async with aiohttp.ClientSession(f"http://{ready['http']}", headers={"x-prelay-details": "1"}) as client:
        for number in range(30):
            prompt = [number + 3, *range(100, 999)]  # begins like no other
            body = {"model": ready["model"], "prompt": prompt, "max_tokens": 8}
            async with client.post("/v1/completions", json=body) as response:
                took.append((await response.json())["prelay"]["decode_worker"])
    # One in a hundred goes somewhere else, to learn how it is there now.
    assert sum(one in near for one in took[10:]) >= 18, took


async def _outlive_faults(
    ready: dict[str, Any], prefill: Host, decode: Host, prefill_comes_back: Callable[[], None]
) -> None:
    # The decode host's cable is cut for a while, in the middle of answers.
    asking = asyncio.create_task(wrong_answers(ready, demo_prompts()[:8]))
    while not (await status_of(ready)).live_requests:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    decode.cut(is_cut=True)
    await asyncio.sleep(4)
    decode.cut(is_cut=False)
    assert await asking == []
    # The prefill host dies, and comes back.
    prefill.kill()
    asking = asyncio.create_task(wrong_answers(ready, demo_prompts()[:8]))
    await asyncio.sleep(2)
    prefill_comes_back()
    assert await asking == []
