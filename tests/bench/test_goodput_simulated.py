"""The same experiment in virtual time: policies and schedulers are those that serve, steps take what a
profile says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from bench.cli_goodput import goodput
from bench.goodput.experiment import Experiment
from bench.goodput.plan import plan_of
from bench.goodput.record import Record
from bench.goodput.run import measure_rounds
from bench.goodput.simulated import Simulator
from cluster.config import demo_model_path
from cluster.workload.judge import judge
from cluster.workload.slo import Slo
from engine.latency import LatencyModel
from tests.bench.goodput_bench import SERVED, experiment, quiet

SHAPES = Path(__file__).parents[2] / "bench" / "shapes"
# A prompt of 64 tokens takes 68 ms, a step of one sequence 6 ms.
PROFILE = LatencyModel({"step": 0.004, "rows": 0.001, "decode_sequences": 0.001, "decode_context": 1e-6})
MEASURE = {"rounds": 1, "seconds": 20.0, "min_requests": 20, "warmup_s": 2.0, "step": 1.3}
# A fixed chunk.
SERVED_ONCE = {**SERVED, "mixed": {"serve": SERVED["mixed"]["serve"]}}


def small(**changes: Any) -> Experiment:
    return experiment(demo_model_path(), measure=MEASURE, deployments=SERVED_ONCE, **changes)


def simulated(one: Experiment, folder: Path) -> Record:
    folder.mkdir()
    plan = plan_of(one, SHAPES, folder, folder)
    record = Record.open(folder / "record.json", one, {}, "a profile")
    asyncio.run(measure_rounds(plan, record, quiet(), venue=Simulator(PROFILE)))
    return record


def test_all_deployments_are_searched_and_the_same_comes_out_again(tmp_path: Path) -> None:
    record = simulated(small(), tmp_path / "a")
    again = simulated(small(), tmp_path / "b")
    assert {point.of.deployment for point in record.points} == set(SERVED_ONCE)
    assert [point.to_json() for point in record.points] == [point.to_json() for point in again.points]
    alone = record.others("idle")
    assert {line["reference"] for line in alone} == {"prefill + decode", "mixed"}
    for line in alone:
        (one,) = line["times"]
        assert one["ttft_s"] == pytest.approx(0.068, abs=0.01)
        assert one["tpot_s"] == pytest.approx(0.005, abs=0.002)


def test_more_load_is_worse_and_what_is_said_is_what_the_rows_say(tmp_path: Path) -> None:
    record = simulated(small(), tmp_path / "a")
    for name in SERVED_ONCE:
        points = sorted(
            (point for point in record.points if point.of.deployment == name), key=lambda point: point.rate
        )
        shares = [point.judged(point.limits).attainment for point in points]
        assert shares[0] >= 0.9 > shares[-1]
        for point in points:
            assert all(row.arrival_s >= 0 for row in point.rows)
            slo = Slo.fixed(point.limits.ttft_s, point.limits.tpot_s)
            assert point.said["outcomes"] == judge(point.rows, slo, point.duration_s).to_json()["outcomes"]
            assert point.said["counted"]["admission.all"] >= len(point.rows)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The experiment and the profile."""
    one = small(
        map={
            "lengths": [{"prompt": 64, "answer": 8}], "ttft": ["3x", "8x"], "tpot": ["3x"],
            "deployments": ["pair", "mixed"],
        }
    )  # fmt: skip
    config, profile = tmp_path / "one.yaml", tmp_path / "core.json"
    config.write_text(yaml.safe_dump(one.model_dump(mode="json", exclude_none=True)))
    profile.write_text(json.dumps(PROFILE.to_json()))
    return config, profile


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(goodput, [str(word) for word in words], catch_exceptions=False)


def test_the_plane_is_drawn_without_a_machine(files: tuple[Path, Path], tmp_path: Path) -> None:
    config, profile = files
    plot, kept = tmp_path / "map.png", tmp_path / "kept.json"
    command = ("--config", config, "--simulate", profile, "--map", "--json", "--resume", kept)
    found = run(*command, "--plot", plot)
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    (plane,) = result["map"]["planes"]
    tight, wide = plane["cells"]
    for one, other in zip(tight["deployments"], wide["deployments"], strict=True):
        assert 0 < one["goodput_per_device_90"] <= other["goodput_per_device_90"]
    assert result["simulated"] == PROFILE.to_json()
    assert plot.stat().st_size > 10_000
    # What was simulated is no measurement, and not of another profile.
    assert "give another file" in run("--config", config, "--map", "--resume", kept).output
    profile.write_text(json.dumps(PROFILE.times(2.0).to_json()))
    assert "give another file" in run(*command).output


def test_an_overload_is_simulated_and_passes(files: tuple[Path, Path], tmp_path: Path) -> None:
    config, profile = files
    plot, kept = tmp_path / "short.png", tmp_path / "kept.json"
    command = ("--config", config, "--simulate", profile, "--overload", "--json", "--resume", kept)
    found = run(*command, "--deployments", "fcfs", "--plot", plot)
    assert found.exit_code == 0, found.output
    [[one]] = [result["deployments"] for result in json.loads(found.stdout)["overload"]]
    half, whole, over, far_over = one["factors"]
    assert min(half["attainment"], whole["attainment"]) > 0.8 > far_over["attainment"]
    assert (half["recovers"], over["recovers"]) == (None, True)
    assert far_over["recovery_s"] is None or over["recovery_s"] <= far_over["recovery_s"]
    assert plot.with_stem("short-overload").stat().st_size > 10_000
    assert json.loads(run(*command, "--deployments", "fcfs").stdout)["overload"][0]["deployments"] == [one]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--simulate", "nothing.json"), "nothing.json, which is not there"),
        (("--simulate",), "the experiment's model has no profile; give one"),
        (("--map", "--overload"), "give one of them"),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    files: tuple[Path, Path], tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    config, profile = files
    found = run(
        "--config", config, "--resume", tmp_path / "kept.json",
        *(str(profile) if word == "PROFILE" else word for word in words),
    )  # fmt: skip
    assert found.exit_code == 2
    assert said in " ".join(found.output.split())
    assert not (tmp_path / "kept.json").exists()
