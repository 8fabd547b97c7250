"""Launch files: read by Ray's own check, and the scripts with a `ray` that only notes how it was called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.config_file import load_config

RAY = Path(__file__).parent.parent.parent / "deploy" / "ray"


@pytest.mark.parametrize("name", ["hosts.yaml", "cloud.yaml"])
def test_ray_takes_the_cluster_file(name: str) -> None:
    """In a process of its own: Ray's autoscaler warns of modules that it misses."""
    script = (
        "import sys, yaml\n"
        "from ray.autoscaler._private.util import prepare_config, validate_config\n"
        "validate_config(prepare_config(yaml.safe_load(open(sys.argv[1]))))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(RAY / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_start_commands_name_scripts_that_are_there() -> None:
    for name in ("hosts.yaml", "cloud.yaml"):
        raw = yaml.safe_load((RAY / name).read_text())
        commands = [*raw["head_start_ray_commands"], *raw["worker_start_ray_commands"]]
        for command in commands:
            for word in command.split():
                if "deploy/ray/" in word:
                    assert os.access(RAY / word.rpartition("/")[2], os.X_OK), command


def test_serve_has_its_pools_on_the_hosts_of_their_role() -> None:
    config = load_config(RAY / "serve.yaml", [])
    assert {name: pool.resources for name, pool in config.pools.items()} == {
        name: {name: 1.0} for name in ("prefill", "decode", "mixed")
    }


@pytest.mark.parametrize("name", ["launch.sh", "stop.sh", "slurm.sh"])
def test_shellcheck_finds_nothing_in_the_scripts(name: str) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([str(shellcheck), str(RAY / name)], capture_output=True)
    assert (done.returncode, done.stdout.decode()) == (0, "")


class Shell:
    """A folder with a `ray` that writes down its arguments and its authentication."""

    def __init__(self, folder: Path) -> None:
        self.home = folder
        self.calls = folder / "calls"
        ray = folder / "bin" / "ray"
        ray.parent.mkdir()
        ray.write_text(
            '#!/bin/sh\npython3 -c \'import json,os,sys; print(json.dumps([os.environ.get("RAY_AUTH_MODE"), '
            f'*sys.argv[1:]]))\' "$@" >> {self.calls}\n'
        )
        ray.chmod(0o755)

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        found = {"PATH": f"{self.home / 'bin'}:/usr/bin:/bin", "HOME": str(self.home), **environment}
        done = subprocess.run(
            [str(RAY / arguments[0]), *arguments[1:]], env=found, capture_output=True, text=True
        )
        return done.returncode, done.stderr

    def called(self) -> list[list[str]]:
        return [json.loads(line) for line in self.calls.read_text().splitlines()]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_the_head_makes_a_token_and_takes_no_work(shell: Shell) -> None:
    assert shell.run("launch.sh", "head", "--", "--block") == (0, "")
    token, start = shell.called()
    assert token == ["token", "get-auth-token", "--generate"]
    assert start[:3] == ["token", "start", "--head"]
    assert "--num-cpus=0" in start
    assert start[-1] == "--block"


def test_a_node_says_whose_workers_it_takes(shell: Shell) -> None:
    assert shell.run("launch.sh", "decode", "10.0.0.1:6379", RAY_AUTH_TOKEN="t") == (0, "")
    (start,) = shell.called()
    assert start[:3] == ["token", "start", "--address=10.0.0.1:6379"]
    assert '--resources={"decode": 1000}' in start
    assert shell.run("launch.sh", "prefill", "10.0.0.1:6379", RAY_AUTH_MODE="disabled")[0] == 0


def test_a_host_has_one_router_and_no_worker(shell: Shell) -> None:
    assert shell.run("launch.sh", "router", "10.0.0.1:6379", RAY_AUTH_TOKEN="t") == (0, "")
    assert shell.run("launch.sh", "head", RAY_AUTH_TOKEN="t") == (0, "")
    for start in shell.called():
        assert {"--num-cpus=0", '--resources={"router": 1}'} <= set(start)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "launch.sh head"),
        (("writer", "10.0.0.1:6379"), 2, "launch.sh prefill|decode|mixed|router HEAD:PORT"),
        (("decode",), 2, "give the head as HOST:PORT"),
        (("decode", "10.0.0.1"), 2, "give the head as HOST:PORT"),
        (("head", "--block"), 2, "launch.sh head"),
        (("decode", "10.0.0.1:6379"), 1, "there is no token in"),
    ],
)
def test_what_is_missing_is_said(shell: Shell, arguments: tuple[str, ...], code: int, said: str) -> None:
    found, written = shell.run("launch.sh", *arguments)
    assert (found, said in written) == (code, True), written
    assert not shell.calls.exists()
