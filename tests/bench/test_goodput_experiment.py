"""Experiments: what is wrong in a file is said before anything starts; those that come with prelay work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.goodput.experiment import WorkloadPart, chosen_part, load_experiment
from bench.goodput.plan import plan_of
from bench.goodput.sources import anchored
from bench.goodput.variants import Variant
from cluster.config import demo_model_path
from cluster.workload.errors import BadInputError
from cluster.workload.slo import Limits
from engine.latency import LatencyModel

ROOT = Path(__file__).parent.parent.parent
SHAPES = ROOT / "bench" / "shapes"
SHIPPED = ROOT / "deploy" / "bench"


def experiment_file(folder: Path, **changes: Any) -> Path:
    """A small experiment on the demo model, with some parts changed; None takes one away."""
    raw: dict[str, Any] = {
        "model": {"path": str(demo_model_path()), "load": "weights", "dtype": "float32"},
        "common": {name: {"kv_cache_tokens": 4096} for name in ("prefill", "decode", "mixed")},
        "deployments": {
            "pair": {"serve": {"router": {"policy": "goodput"}}},
            "mixed": {
                "serve": {
                    "router": {"policy": "colocated"},
                    "prefill": {"replicas": 0},
                    "decode": {"replicas": 0},
                    "mixed": {"replicas": 2},
                },
                "search": {"mixed.max_batch_tokens": [64, 256]},
            },
        },
        "workloads": {"short": {"dataset": "synthetic:prompt=64,answer=4", "slo": "ttft=3x,tpot=50ms"}},
    }
    for name, value in changes.items():
        if value is None:
            del raw[name]
        else:
            raw[name] = value
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def planned(path: Path, folder: Path) -> Any:
    return plan_of(load_experiment(path), SHAPES, path.parent, folder)


def test_every_value_to_try_is_a_variant(tmp_path: Path) -> None:
    plan = planned(experiment_file(tmp_path), tmp_path)
    (pair,), mixed = plan.variants["pair"], plan.variants["mixed"]
    assert (pair.name, pair.policy, pair.devices, pair.readers) == ("pair", "goodput", 2, 1)
    assert [one.setting for one in mixed] == ["mixed.max_batch_tokens=64", "mixed.max_batch_tokens=256"]
    assert [one.config.mixed.max_batch_tokens for one in mixed] == [64, 256]
    assert [(one.devices, one.readers, one.sees_limits) for one in mixed] == [(2, 2, False)] * 2
    assert pair.sees_limits
    assert {one.deployment: one.devices for one in plan.references} == {"prefill + decode": 2, "mixed": 1}


def test_limits_are_those_of_the_only_class(tmp_path: Path) -> None:
    pair: Variant = planned(experiment_file(tmp_path), tmp_path).variants["pair"][0]
    slo = pair.under(Limits(1.25, 0.04)).slo
    assert {name: (one.ttft_s, one.tpot_s) for name, one in slo.classes.items()} == {"workload": (1.25, 0.04)}
    assert slo.default == "workload"


SHORT = {"dataset": "synthetic:prompt=64,answer=4"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": None}, ["model: Field required"]),
        ({"workloads": {}}, ["workloads", "at least 1"]),
        ({"rounds": 3}, ["rounds", "it is 3"]),
        ({"model": {"shape": "smollm2-135m", "path": "x"}}, ["either shape", "or path"]),
        ({"model": {"shape": "smollm2-135m", "load": "weights"}}, ["a shape has no weights"]),
        ({"model": {"shape": "gpt-5"}}, ["there is no 'gpt-5'", "smollm2-135m"]),
        ({"model": {"shape": "smollm2-135m", "load": "simulated"}}, ["profile: FILE"]),
        ({"model": {"shape": "smollm2-135m", "time_scale": 2.0}}, ["time_scale is for load: simulated"]),
        (
            {"model": {"shape": "smollm2-135m", "load": "simulated", "profile": "none.json"}},
            ["none.json", "not there"],
        ),
        ({"model": {"path": "nowhere", "load": "weights"}}, ["model:", "nowhere"]),
        ({"deployments": {"a": {"serve": {"router": {"policy": "best"}}}}}, ["not a policy"]),
        ({"deployments": {"a": {"serve": {"decode": {"replica": 1}}}}}, ["decode.replicas?"]),
        ({"deployments": {"a": {"serve": {"slo": {"default": "x"}}}}}, ["deployments.a", "the workload's"]),
        ({"deployments": {"a": {"serve": {"router": {"policy": "colocated"}}}}}, ["mixed.replicas is 0"]),
        ({"deployments": {"a": {"serve": {}, "search": {"chunk": [1]}}}}, ["'chunk' is not SECTION.KEY"]),
        ({"workloads": {"w": {"dataset": "trace:none.csv"}}}, ["workloads.w", "none.csv"]),
        ({"workloads": {"w": {**SHORT, "arrivals": "trace"}}}, ["workloads.w", "no arrivals of its own"]),
        ({"workloads": {"w": {**SHORT, "slo": "ttft=0,tpot=1"}}}, ["workloads.w", "greater than 0"]),
        ({"workloads": {"w": {**SHORT, "max_tokens": 4096}}}, ["workloads.w", "takes 1024 at most"]),
        ({"measure": {"step": 1.0}}, ["measure.step", "greater than 1.01"]),
        (
            {
                "model": {"shape": "smollm2-135m", "load": "simulated", "profile": "some.json"},
                "measure": {"follow_pace": True},
            },
            ["measure.follow_pace", "a simulated one has none"],
        ),
        ({"measure": {"seconds": -1.0}}, ["measure.seconds", "greater than 0"]),
        (
            {"map": {"lengths": [{"prompt": 8, "answer": 8}], "ttft": ["3x"], "tpot": ["3x"],
                     "deployments": ["pair", "triple"]}},
            ["map.deployments", "no 'triple'", "pair, mixed"],
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    path = experiment_file(tmp_path, **changes)
    with pytest.raises(BadInputError) as error:
        planned(path, tmp_path)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "is not YAML"), ("- 1", "a mapping"), ("", "a mapping")]
)
def test_what_is_no_experiment_is_said(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    with pytest.raises(BadInputError, match=words):
        load_experiment(path)
    with pytest.raises(BadInputError, match=r"none\.yaml: No such file"):
        load_experiment(tmp_path / "none.yaml")


def test_a_part_can_be_chosen(tmp_path: Path) -> None:
    experiment = load_experiment(experiment_file(tmp_path))
    part = chosen_part(experiment, ["short"], ["mixed"], 7, 2.5)
    assert (list(part.workloads), list(part.deployments)) == (["short"], ["mixed"])
    assert (part.measure.rounds, part.measure.seconds) == (7, 2.5)
    assert chosen_part(experiment, None, None, None, None) == experiment
    assert experiment.measure.search_99
    assert not chosen_part(experiment, None, None, None, None, only_90=True).measure.search_99
    with pytest.raises(BadInputError, match="--deployments: there is no 'pears'; there are pair, mixed"):
        chosen_part(experiment, None, ["pears"], None, None)
    with pytest.raises(BadInputError, match="--seconds 0"):
        chosen_part(experiment, None, None, None, 0.0)


def test_files_of_workloads_count_from_the_traces() -> None:
    traces = Path("/traces")
    assert anchored("trace:a.csv", traces) == "trace:/traces/a.csv"
    assert anchored("sharegpt:a/b.csv", traces) == "sharegpt:/traces/a/b.csv"
    assert anchored("mix:a.csv,b.csv,period=5", traces) == "mix:/traces/a.csv,/traces/b.csv,period=5"
    assert anchored("synthetic:prompt=1,answer=1", traces) == "synthetic:prompt=1,answer=1"


@pytest.mark.parametrize("name", ["two-cores", "large-pools"])
def test_what_comes_with_prelay_can_be_planned(tmp_path: Path, name: str) -> None:
    experiment = load_experiment(SHIPPED / f"{name}.yaml")
    synthetic = {"short": WorkloadPart(dataset=SHORT["dataset"])}
    plan = plan_of(experiment.model_copy(update={"workloads": synthetic}), SHAPES, tmp_path, tmp_path)
    devices = {one.devices for some in plan.variants.values() for one in some}
    assert devices == {2 if name == "two-cores" else 16}


def test_a_simulated_model_takes_as_much_longer_as_it_is_told(tmp_path: Path) -> None:
    experiment = load_experiment(SHIPPED / "large-pools.yaml")
    plan = plan_of(experiment.model_copy(update={"workloads": {}}), SHAPES, tmp_path, tmp_path)
    profile = plan.variants["goodput"][0].config.model.profile
    told, scaled = opt_13b(), LatencyModel.from_json(json.loads(profile.read_text()))
    assert scaled.prefill_s(512) == pytest.approx(experiment.model.time_scale * told.prefill_s(512))


def opt_13b() -> LatencyModel:
    return LatencyModel.from_json(json.loads((SHIPPED / "opt-13b-a100.json").read_text())["latency"])


@pytest.mark.parametrize("tokens", [256, 512, 1024, 2048])
def test_the_profile_reads_prompts_as_distserve_measured_it(tokens: int) -> None:
    """Zhong et al., OSDI 2024: OPT-13B on an A100, milliseconds."""
    published = (18.10 + 0.1019 * tokens + 7.122e-6 * tokens**2) / 1000
    assert opt_13b().prefill_s(tokens) == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize("batch", [1, 8, 32, 64, 90, 96, 128, 160])
def test_the_profile_decodes_as_distserve_measured_it(batch: int) -> None:
    """Its two regimes meet at a batch of 95 with a step of 9 %, which no sum of lines has."""
    step, context, sequence = (19.93, 6.269e-4, 0.0385) if batch < 95 else (7.166, 5.798e-4, 0.1583)
    published = (step + context * 400 * batch + sequence * batch) / 1000
    assert opt_13b().decode_s(batch, 400 * batch) == pytest.approx(
        published, rel=0.05 if batch != 96 else 0.1
    )
