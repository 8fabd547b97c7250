"""`prelay bench accuracy` on a small cluster whose engines are simulated: what is compared is the structure
of the two, not the speed of the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import demo_model_path

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

_LATENCY = {"step": 0.02, "rows": 5e-4, "decode_sequences": 4e-3, "decode_context": 4e-6}
_WITHIN = 15.0
"""Points of attainment, of some forty requests on a machine that may be busy with something else."""


def experiment(folder: Path) -> Path:
    profile = folder / "steps.json"
    profile.write_text(json.dumps({"version": 1, "coefficients": _LATENCY}))
    raw: dict[str, Any] = {
        "model": {
            "path": str(demo_model_path()),
            "load": "simulated",
            "profile": str(profile),
            "dtype": "float32",
        },
        "common": {
            **{name: {"kv_cache_tokens": 8192} for name in ("prefill", "decode", "mixed")},
            "router": {"liveness_timeout_s": 20.0},
        },
        "deployments": {"apart": {"serve": {"router": {"policy": "goodput"}}}},
        "workloads": {"short": {"dataset": "synthetic:prompt=100-400,answer=8-24", "slo": "ttft=1,tpot=0.1"}},
        "measure": {"rounds": 1, "seconds": 8.0, "warmup_s": 1.0, "min_requests": 40, "timeout_s": 20.0},
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def measured(folder: Path, *more: str) -> dict[str, Any]:
    command = [
        sys.executable, "-P", "-m", "bench", "accuracy", "--config", str(experiment(folder)),
        "--resume", str(folder / "record.json"), "--json", *more,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_is_simulated_is_what_is_measured(tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    found = measured(tmp_path, "--shares", "0.5,2.5", "--plot", str(plot))
    light, heavy = found["rows"]
    assert [(row["deployment"], row["of_saturation"] > 1) for row in (light, heavy)] == [
        ("apart", False), ("apart", True)
    ]  # fmt: skip
    assert light["attainment_real"] > heavy["attainment_real"]
    assert light["attainment_simulated"] > heavy["attainment_simulated"]
    assert light["error_points"] <= _WITHIN
    assert light["ttft_p50_real_s"] == pytest.approx(light["ttft_p50_simulated_s"], rel=0.5)
    assert light["tpot_p50_real_s"] == pytest.approx(light["tpot_p50_simulated_s"], rel=0.5)
    assert found["max_error_points_below"] <= _WITHIN
    assert found["max_error_points"] >= found["max_error_points_beyond"]
    for case in found["cases"]:
        assert case["correction"]["reading"] == pytest.approx(1.0, rel=0.3)
    assert plot.stat().st_size > 10_000

    record = (tmp_path / "record.json").read_text()
    assert measured(tmp_path, "--shares", "0.5,2.5")["rows"] == found["rows"]
    assert (tmp_path / "record.json").read_text() == record, "nothing was measured again"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rates", "0"), "--rates '0': numbers greater than 0 are needed"),
        (("--shares", "a,b"), "--shares 'a,b': numbers greater than 0 are needed"),
        (("--deployments", "best"), "--deployments: there is no 'best'"),
    ],
)
def test_nonsense_is_refused_before_anything_is_started(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    command = [sys.executable, "-P", "-m", "bench", "accuracy", "--config", str(experiment(tmp_path))]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert words in done.stderr
