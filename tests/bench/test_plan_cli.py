"""`prelay plan` as it is typed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bench import cli
from bench.plan.options import model_section
from bench.plan.report import write_plan
from cluster.config import demo_model_path
from cluster.config_file import Override, load_config
from cluster.planner.hardware import GPUS, Devices, Hardware
from cluster.planner.kinds import ReckonedKinds
from cluster.planner.plans import Plan, Pool
from cluster.planner.question import Question
from cluster.preflight import check_model
from cluster.workload.arrivals import Arrivals
from cluster.workload.datasets import load_dataset
from cluster.workload.drawing import WorkloadSpec
from cluster.workload.slo import Slo
from engine.config import ModelConfig
from engine.latency import LatencyModel
from router.pool_view import Role

Run = Callable[..., int]
LINES = {
    "1": ([18.0, 0.1, 7e-6], [20.0, 6e-4, 0.04], [7.0, 5.8e-4, 0.16]),
    "2": ([14.0, 0.07, 3e-6], [13.0, 3e-4, 0.06], [10.0, 3e-4, 0.09]),
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def start(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bench", "plan", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return start


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    by_tp = {
        tp: {
            "prefill": prefill,
            "decoding_smallbs": small,
            "decoding_largebs": large,
            "decoding_large_small_bs_threshold": 95,
        }
        for tp, (prefill, small, large) in LINES.items()
    }
    (tmp_path / "max_num_tokens.csv").write_text(
        "model,tp,pp,max_num_tokens\nzoo/ant,1,1,66144\nzoo/ant,1,2,163008\nzoo/ant,2,1,163008\n"
    )
    path = tmp_path / "ant.json"
    path.write_text(json.dumps({"zoo/ant": by_tp}))
    return path


def ant(profile: Path, *more: str) -> tuple[str, ...]:
    return (
        "--profile", str(profile), "--model", "ant", "--gpus", "a100-80g:4", "--mode", "distserve",
        "--dataset", "synthetic:prompt=500,answer=60", "--slo", "ttft=0.3,tpot=0.1",
        "--count", "100", "--seeds", "1", *more,
    )  # fmt: skip


@pytest.mark.slow
def test_what_a_program_reads_and_what_serve_takes(
    run: Run, profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "plan.yaml", tmp_path / "plan.png"
    assert run(*ant(profile), "--json", "--out", str(out), "--plot", str(plot)) == 0
    result = json.loads(capsys.readouterr().out)
    best = result["plans"][0]
    assert best["goodput_per_device"] == max(plan["goodput_per_device"] for plan in result["plans"])
    assert best["ci"][0] <= best["goodput_per_device"] <= best["ci"][1]
    assert result["wall_s"] > 0
    assert result["verdict"].startswith(("run ", "do not disaggregate: run "))
    roles = [role for role in ("prefill", "decode", "mixed") if role in best]
    for role in roles:
        assert {"tp", "pp", "replicas"} <= best[role].keys()
    config = load_config(out, [])
    for role in roles:
        assert getattr(config, role).replicas == best[role]["replicas"]
        assert getattr(config, role).tensor_parallel == best[role]["tp"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_serve_takes_the_plan_of_a_checkpoint_as_it_is(tmp_path: Path) -> None:
    checkpoint, out = demo_model_path(), tmp_path / "plan.yaml"
    hardware = Hardware([Devices(GPUS["a10g-24g"], 1)])
    (kind,) = ReckonedKinds(ModelConfig.from_pretrained(checkpoint), hardware).kinds(120)
    workload = WorkloadSpec(
        load_dataset("synthetic:prompt=100,answer=20"), Arrivals.parse("poisson"), range(0)
    )
    question = Question(workload, Slo.fixed(0.1, 0.02), hardware)
    plan = Plan((Pool(Role.MIXED, kind, 1),))
    write_plan(question, plan, model_section(str(checkpoint), question, plan), out)
    ray = Override(("ray", "address"), "10.0.0.1:6379", "the test")  # where memory is not this machine's
    config = check_model(load_config(out, [ray]).resolved())
    assert config.model.dtype == "bfloat16"
    assert config.model.path == checkpoint
    assert config.model.max_model_len == 1024, "what the model was made for"
    small = Plan((Pool(Role.MIXED, replace(kind, kv_tokens=300), 1),))
    assert model_section("opt-13b", question, small) == {"dtype": "bfloat16", "max_model_len": 300}


@pytest.mark.slow
def test_why_is_explained(run: Run, profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ant(profile), "--explain") == 0
    said = capsys.readouterr().out
    assert "reading alone would keep its limit up to" in said
    assert "the next best" in said


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (("--slo", "ttft=1ms,tpot=1"), 1, "ttft is 0.001 s, but a request of 500 tokens alone takes"),
        (("--gpus", "b100:4"), 2, "nothing is known of 'b100'"),
        (("--gpus", "a100-80g:4,h100-80g:4"), 2, "was measured on devices of one kind"),
        (("--model", "bee"), 2, "is a profile of zoo/ant; give one of these"),
        (("--mode", "prelay"), 2, "--kv-bytes N is missing"),
        (
            ("--dataset", "synthetic:prompt=200000,answer=60"),
            1,
            "no measured split (TP1 PP1, TP1 PP2,",
        ),
        (("--for-rate", "nan"), 2, "nan is not a number"),
        (
            ("--objective", "cost"),
            2,
            "the cost of a100-80g; give it as a100-80g:COUNT:PRICE",
        ),
        (("--trace", "nowhere.csv"), 2, "give either --trace FILE or --dataset"),
    ],
)
def test_what_cannot_be_is_said(
    run: Run,
    profile: Path,
    change: tuple[str, ...],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*ant(profile), *change) == code
    assert said in capsys.readouterr().err


@pytest.fixture
def core(tmp_path: Path) -> Path:
    """What `prelay profile --json` writes, as far as it is read."""
    latency = LatencyModel({"step": 0.01, "rows": 0.001, "decode_sequences": 0.001, "decode_context": 1e-6})
    path = tmp_path / "core.json"
    path.write_text(json.dumps({"model": "smollm2-135m", "latency": latency.to_json()}))
    return path


def of_core(core: Path) -> list[str]:
    asked = ["--profile", str(core), "--gpus", "core:2", "--dataset", "synthetic:prompt=200,answer=40"]
    return [*asked, "--slo", "ttft=2,tpot=60ms", "--count", "20", "--seeds", "1"]


def test_workers_that_prelay_has_profiled_are_planned_with(
    run: Run, core: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*of_core(core), "--kv-tokens", "8192", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    devices = {sum(plan[role]["replicas"] for role in ("prefill", "decode", "mixed") if plan.get(role))
               for plan in result["plans"]}  # fmt: skip
    assert devices <= {1, 2}
    assert max(plan["goodput_per_device"] for plan in result["plans"]) > 0.5


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ((), 2, "--kv-tokens N is missing, the room of a worker's KV cache: of core it cannot be reckoned"),
        (("--kv-tokens", "128"), 1, "a worker holds 128 tokens, and the longest sequence has 240"),
        (("--kv-tokens", "8192", "--model", "qwen3-8b"), 2, "was measured with smollm2-135m"),
        (("--kv-tokens", "8192", "--gpus", "core:1,nuc:1"), 2, "devices of one kind"),
        (("--kv-tokens", "8192", "--mode", "distserve"), 2, "needs a --profile of DistServe's, which"),
        (("--kv-tokens", "8192", "--objective", "watt"), 2, "core"),
    ],
)
def test_what_a_profile_of_a_worker_leaves_open_is_asked_for(
    run: Run,
    core: Path,
    change: tuple[str, ...],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*of_core(core), *change) == code
    assert said in capsys.readouterr().err


def test_room_is_not_asked_for_where_it_is_known(
    run: Run, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*ant(profile), "--kv-tokens", "4096") == 2
    assert "--kv-tokens is for a --profile of `prelay profile`" in capsys.readouterr().err


def test_a_model_that_fits_nowhere(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = "synthetic:prompt=90000,answer=60"
    asked = ("--gpus", "a10g-24g:1", "--dataset", dataset, "--slo", "ttft=9,tpot=1")
    assert run("--model", "llama-3.1-8b", *asked) == 1
    assert "the model fits on no plan: with a sequence of 90060 tokens it needs" in capsys.readouterr().err
    assert run("--model", "no-such", *asked) == 2
    assert "--model no-such: no checkpoint lies there, and shapes are llama-3.1-8b" in capsys.readouterr().err
