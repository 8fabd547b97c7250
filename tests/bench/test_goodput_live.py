"""`prelay bench goodput` on real deployments of the demo model: a small run, its end by a signal, and nothing
left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.config import demo_model_path

_MARK = "PRELAY_TEST_GOODPUT"
_GONE_S = 20.0

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]


def experiment(folder: Path, **changes: Any) -> Path:
    """So small that its figures mean nothing."""
    raw = {
        "model": {"path": str(demo_model_path()), "load": "weights", "dtype": "float32"},
        "common": {
            **{name: {"kv_cache_tokens": 4096} for name in ("prefill", "decode", "mixed")},
            "router": {"liveness_timeout_s": 20.0},
        },
        "deployments": {
            "pair": {"serve": {"router": {"policy": "goodput"}}},
            "colocated": {
                "serve": {
                    "router": {"policy": "colocated"},
                    "prefill": {"replicas": 0},
                    "decode": {"replicas": 0},
                    "mixed": {"replicas": 2},
                }
            },
        },
        "workloads": {"short": {"dataset": "synthetic:prompt=64-128,answer=4", "slo": "ttft=50x,tpot=50x"}},
        "measure": {
            "rounds": 1,
            "seconds": 1.0,
            "warmup_s": 0.2,
            "min_requests": 5,
            "max_points": 2,
            "timeout_s": 20.0,
            "step": 2.0,
            "follow_pace": True,
        },
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump({**raw, **changes}))
    return path


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, and the mark of all processes that it has started; its output in files of the folder."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-P", "-m", "bench", "goodput", *arguments]
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        environment = {**os.environ, _MARK: mark}
        process = subprocess.Popen(command, stdout=out, stderr=err, text=True, env=environment)
        try:
            yield process, mark
        finally:
            process.kill()
            process.wait()


def left(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def assert_gone(mark: str) -> None:
    since = time.monotonic()
    while some := left(mark):
        assert time.monotonic() - since < _GONE_S, f"left: {some}"
        time.sleep(0.1)


def test_a_whole_comparison(tmp_path: Path) -> None:
    config, record, plot = experiment(tmp_path), tmp_path / "record.json", tmp_path / "plot.png"
    arguments = (
        "--config",
        str(config),
        "--resume",
        str(record),
        "--json",
        "--overload",
        "--plot",
        str(plot),
    )
    with running(tmp_path, *arguments) as (process, mark):
        assert process.wait() == 0, (tmp_path / "err").read_text()
        assert_gone(mark)
    result = json.loads((tmp_path / "out").read_text())
    (workload,) = result["workloads"]
    assert result["devices"] == 2
    assert workload["slo"]["ttft_s"] > 0
    assert {one["name"]: one["policy"] for one in workload["deployments"]} == {
        "pair": "goodput",
        "colocated": "colocated",
    }
    for one in workload["deployments"]:
        assert {
            "goodput_per_device_90",
            "ci90",
            "goodput_per_device_99",
            "attainment_by_length",
        } <= one.keys()
        assert one["points"][0]["outcomes"]
        assert one["at_crossing"]["stages_s"].keys() >= {"gate", "prefill", "decode"}
        assert one["at_crossing"]["counted"]["admission.accepted.none"] > 0
    placed = {
        one["name"]: {name for name in one["at_crossing"]["counted"] if name.startswith("placement")}
        for one in workload["deployments"]
    }
    assert placed == {"pair": {"placement.disaggregated"}, "colocated": {"placement.local"}}
    (overload,) = result["overload"]
    assert [factor["factor"] for factor in overload["deployments"][0]["factors"]] == [0.5, 1.0, 1.5, 3.0]
    assert plot.stat().st_size > 10_000
    assert plot.with_stem("plot-overload").stat().st_size > 10_000

    before = record.read_text()
    with running(tmp_path, *arguments) as (process, mark):
        assert process.wait() == 0, (tmp_path / "err").read_text()
    assert json.loads((tmp_path / "out").read_text()) == result
    assert record.read_text() == before, "nothing was measured again"


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_ended_in_the_middle_it_leaves_a_usable_file_and_no_process(
    tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    config, record = experiment(tmp_path), tmp_path / "record.json"
    with running(tmp_path, "--config", str(config), "--resume", str(record)) as (process, mark):
        while '"kind": "idle"' not in (record.read_text() if record.exists() else ""):
            assert process.poll() is None, (tmp_path / "err").read_text()
            time.sleep(0.05)
        assert len(left(mark)) > 1
        process.send_signal(sent)
        assert process.wait() == code
        assert_gone(mark)
    if sent is not signal.SIGKILL:
        assert f"--resume {record}" in (tmp_path / "err").read_text()
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["kind"] for line in lines][:3] == ["experiment", "pace", "idle"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"deployments": {"one": {"serve": {"router": {"policy": "best"}}}}}, "'best' is not a policy"),
        ({"model": {"path": "nowhere", "load": "weights"}}, "the model cannot be served"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_started(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    config, record = experiment(tmp_path, **changes), tmp_path / "record.json"
    with running(tmp_path, "--config", str(config), "--resume", str(record)) as (process, _):
        assert process.wait() == 2
    assert words in (tmp_path / "err").read_text()
    assert not record.exists()
