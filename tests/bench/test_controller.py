"""The controller in virtual time: what it is told, what it does, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from bench.cli_controller import _experiment, controller
from bench.controller import live
from bench.controller.contenders import Watched
from bench.controller.measure import Experiment
from bench.controller.phases import Phase, Shift
from bench.controller.report import shapes_of
from bench.goodput.experiment import WorkloadPart
from bench.goodput.sources import Source, source_of
from cluster.config import demo_model_path
from cluster.role_decider import RoleDecider, Shape, Verdict
from cluster.workload.errors import BadInputError
from cluster.workload.judge import Outcome, outcome_of
from engine.latency import LatencyModel

# A prompt of 700 tokens takes 0.7 s, a step of one sequence 12 ms.
PROFILE = LatencyModel({"step": 0.01, "rows": 0.001, "decode_sequences": 0.001, "decode_context": 1e-6})
WORKLOADS = {
    "talk": {"dataset": "synthetic:prompt=16-32,answer=60-90"},
    "code": {"dataset": "synthetic:prompt=500-700,answer=2-4"},
    "trace": {"dataset": "trace:not-there.csv"},
}
LONG_PROMPTS = "code@3"
SLO = ["--slo", "ttft=3,tpot=60ms"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "core.json").write_text(json.dumps(PROFILE.to_json()))
    rooms = {"kv_cache_tokens": 8192}
    experiment = {
        "model": {
            "path": str(demo_model_path()),
            "load": "simulated",
            "profile": "core.json",
            "max_model_len": 1024,
        },
        "common": {"prefill": rooms, "decode": rooms, "mixed": rooms},
        "deployments": {"any": {"serve": {}}},
        "workloads": WORKLOADS,
    }
    target = tmp_path / "shifts.yaml"
    target.write_text(yaml.safe_dump(experiment))
    return target


def experiment_of(config: Path, folder: Path, **chosen: Any) -> Experiment:
    asked = {
        "config_file": config, "traces": None, "phases": LONG_PROMPTS, "seconds": 150.0,
        "slo": "ttft=3,tpot=60ms", "workers": 4, "away": 2.0, "seeds": 1,
    }  # fmt: skip
    folder.mkdir()
    return _experiment({**asked, **chosen}, folder)


def run(config: Path, *words: str) -> Result:
    return CliRunner().invoke(controller, ["--config", str(config), *words])


def source(name: str) -> Source:
    return source_of(name, WorkloadPart(**WORKLOADS[name]), Path(), 1024)


def test_phases_follow_each_other_and_have_what_their_rates_say() -> None:
    shift = Shift([Phase(source("talk"), 2.0, 50.0), Phase(source("code"), 4.0, 30.0)])
    requests = shift.arrivals(0)
    assert [one.arrival_s for one in requests] == sorted(one.arrival_s for one in requests)
    first = [one for one in requests if one.arrival_s < 50.0]
    assert (len(first), len(requests)) == (100, 220)
    assert max(one.shape.prompt_tokens for one in first) <= 32
    assert min(one.shape.prompt_tokens for one in requests[100:]) >= 500
    assert requests[-1].arrival_s <= 80.0
    assert shift.arrivals(0) == requests != shift.arrivals(1)


def test_all_shapes_serve_and_have_all_workers() -> None:
    shapes = shapes_of(3)
    assert len(shapes) == len(set(shapes))
    assert {shape.prefill + shape.decode + shape.mixed for shape in shapes} == {3}
    assert {Shape(2, 1, 0), Shape(0, 0, 3), Shape(1, 1, 1)} <= set(shapes)
    assert Shape(3, 0, 0) not in shapes


@pytest.mark.slow
def test_wrong_roles_become_right_ones_and_that_pays(config: Path, tmp_path: Path) -> None:
    """Long prompts and one worker that reads them: after three looks another one does, and so on."""
    experiment = experiment_of(config, tmp_path / "work", seconds=200.0)
    requests, wrong = experiment.shift.arrivals(0), Shape(1, 3, 0)
    shaper, stays = experiment.controlled(), Watched()
    changed = experiment.run(wrong, requests, 0, shaper)
    stayed = experiment.run(wrong, requests, 0, stays)
    assert [shape for _, shape in stays.shapes] == [wrong]
    assert shaper.shapes[0][1] == wrong
    last = shaper.shapes[-1][1]
    assert last.prefill + last.mixed > 1
    made = [look for look in shaper.looks if look.decision.verdict is Verdict.CHANGE]
    assert len(made) >= len(shaper.shapes) - 1
    # What was written down of it is enough to decide the same again.
    decider = RoleDecider()
    again = [decider.look(look.at_s, look.present, look.forecasts) for look in shaper.looks]
    assert again == [look.decision for look in shaper.looks]
    late = [row.arrival_s > 120 for row in changed]

    def good(rows: Any) -> int:
        judged = zip(rows, late, strict=True)
        return sum(is_late and outcome_of(row, experiment.slo) is Outcome.GOOD for row, is_late in judged)

    assert good(changed) > 1.3 * good(stayed)


def test_the_command_says_what_became_of_each_phase(config: Path, tmp_path: Path) -> None:
    words = [
        "--phases", "talk@2,code@1", "--seconds", "30", "--workers", "2", "--seeds", "1", *SLO,
        "--plot", str(tmp_path / "a.png"),
    ]  # fmt: skip
    done = run(config, *words, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["devices"] == 2
    assert [one["workload"] for one in result["phases"]] == ["talk", "code"]
    assert [one["name"] for one in result["deployments"]] == ["controller", "first stays", "best stays"]
    for one in result["deployments"]:
        for good, of, phase in zip(one["goodput"], one["of_oracle"], result["phases"], strict=True):
            assert 0 <= good <= phase["rate"] * 1.001
            assert of == pytest.approx(good / phase["oracle"]["goodput"])
        total = sum(good * 30 for good in one["goodput"])
        assert sum(good * 30 for _, good in one["timeline"]) == pytest.approx(total)
    assert result["deployments"][0]["shapes"][0][0]["shape"] == result["phases"][0]["oracle"]["shape"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    table = run(config, *words)
    assert "of the oracle's" in table.output
    assert "controller" in table.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--phases", "tolk@2", *SLO], "one of the workloads code, talk, trace"),
        (["--phases", "talk", *SLO], "is not WORKLOAD@RATE"),
        (["--phases", "talk@0", *SLO], "is not WORKLOAD@RATE"),
        (["--phases", "talk@inf", *SLO], "is not WORKLOAD@RATE"),
        (["--phases", "trace@2", *SLO], "not-there.csv"),
        (["--phases", "talk@2", "--slo", "ttft=3x,tpot=60ms"], "give seconds or ms"),
        (["--phases", "talk@2", "--slo", "soon"], "soon"),
        (["--phases", "talk@2", *SLO, "--workers", "1"], "--workers"),
        (["--phases", "talk@2", *SLO, "--seconds", "0"], "--seconds"),
        (
            ["--phases", "talk@2", "--slo", "ttft=1ms,tpot=1ms", "--seconds", "9", "--workers", "2"],
            "not one request is good on 2 workers",
        ),
    ],
)
def test_nonsense_is_answered_with_what_would_do(config: Path, words: list[str], said: str) -> None:
    answered = run(config, *words)
    assert answered.exit_code == 2
    assert said in answered.output


@pytest.mark.slow
@pytest.mark.ray
def test_with_a_model_that_is_there_all_is_real(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "shapes_of", lambda count: [Shape(count - 1, 1, 0)])
    raw = yaml.safe_load(config.read_text())
    raw["model"] = {"path": str(demo_model_path()), "load": "weights"}
    config.write_text(yaml.safe_dump(raw))
    words = ["--phases", "talk@2,code@1", "--seconds", "4", "--workers", "2", "--seeds", "1"]
    done = run(config, *words, "--slo", "ttft=20,tpot=2", "--json", "--plot", str(tmp_path / "a.png"))
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert not result["simulated"]
    assert result["goodput_of_shapes"] == {"1 prefill + 1 decode + 0 mixed": [2.0, 1.0]}
    assert [one["name"] for one in result["deployments"]] == ["controller", "first stays", "best stays"]
    assert result["deployments"][0]["goodput"] == [2.0, 1.0]
    assert result["deployments"][0]["shapes"] == [[{"at_s": 0.0, "shape": "1 prefill + 1 decode + 0 mixed"}]]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_workload_is_bad_input() -> None:
    with pytest.raises(BadInputError, match="'talk@x' is not"):
        Shift.parse("talk@x", 60.0, {"talk": source("talk")}, ["talk"])
