"""`prelay simulate` as it is typed."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import cli

Run = Callable[..., int]
JOB = "arrival_s,prompt_tokens,output_tokens\n0.0,512,3\n0.1,300,10\n0.2,900,1\n"
LINES = {
    "large_from": 95,
    "1": ([18.0, 0.1, 7e-6], [20.0, 6e-4, 0.04], [7.0, 5.8e-4, 0.16]),
    "2": ([14.0, 0.07, 3e-6], [13.0, 3e-4, 0.06], [10.0, 3e-4, 0.09]),
}
CORE = {"version": 1, "coefficients": {"step": 0.01, "rows": 0.0007, "decode_sequences": 0.001}}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def start(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bench", "simulate", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return start


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """One of DistServe's, of a model that there is not."""
    by_tp = {
        tp: {
            "prefill": prefill,
            "decoding_smallbs": small,
            "decoding_largebs": large,
            "decoding_large_small_bs_threshold": 95,
        }
        for tp, (prefill, small, large) in ((tp, LINES[tp]) for tp in ("1", "2"))
    }
    (tmp_path / "max_num_tokens.csv").write_text(
        "model,tp,pp,max_num_tokens\nzoo/ant,1,1,66144\nzoo/ant,1,2,163008\nzoo/ant,2,1,163008\n"
    )
    path = tmp_path / "ant.json"
    path.write_text(json.dumps({"zoo/ant": by_tp}))
    return path


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.csv"
    path.write_text(JOB)
    return path


@pytest.fixture
def core(tmp_path: Path) -> Path:
    path = tmp_path / "core.json"
    path.write_text(json.dumps(CORE))
    return path


def distserve(profile: Path, job: Path, *more: str, mode: str = "distserve") -> tuple[str, ...]:
    return (
        "--mode", mode, "--profile", str(profile), "--model", "ant", "--trace", str(job),
        "--prefill", "tp=1", "--decode", "tp=1", "--slo", "ttft=0.25,tpot=0.1", *more,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["distserve", "distserve-colocated"])
def test_what_a_program_reads(
    run: Run, profile: Path, job: Path, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "rows.csv"
    assert run(*distserve(profile, job, "--json", "--requests", str(target), mode=mode)) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result["requests"] == 3
    assert result["attainment"] == result["ttft_attainment"] == result["tpot_attainment"] == 1.0
    assert result["ttft_s"].keys() == result["tpot_s"].keys() == {"p50", "p90", "p99"}
    assert result["wall_s"] > 0
    assert result["devices"] == (2 if mode == "distserve" else 1)
    rows = list(csv.DictReader(target.read_text().splitlines()))
    assert [(row["prompt_tokens"], row["output_tokens"]) for row in rows] == [
        ("512", "3"), ("300", "10"), ("900", "1"),
    ]  # fmt: skip
    prefill_ms = 18 + 0.1 * 512 + 7e-6 * 512**2 + 1 + 2 + 1e-4 * 512
    assert float(rows[0]["ttft_s"]) == pytest.approx(prefill_ms / 1000)
    if mode == "distserve":
        decode_ms = sum(22.04 + 6e-4 * (513 + step) + 1e-4 * (512 + step) for step in range(3)) / 3
        assert float(rows[0]["tpot_s"]) == pytest.approx(decode_ms / 1000)


def test_prelays_own_cores_with_either_kind_of_profile(
    run: Run, profile: Path, core: Path, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plot.png"
    own = ("--profile", str(core), "--model", "smollm2-135m", "--dataset", "synthetic:prompt=64,answer=8")
    assert run(*own, "--rates", "1,4", "--count", "20", "--seeds", "2", "--json", "--plot", str(plot)) == 0
    result = json.loads(capsys.readouterr().out)
    assert [rate["requests"] for rate in result["rates"]] == [40, 40]
    assert result["placements"] == {"disaggregated": 80}
    assert result["devices"] == 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    theirs = ("--profile", str(profile), "--model", "ant", "--kv-bytes", "1000", "--trace", str(job))
    assert run(*theirs, "--prefill", "tp=2,replicas=2", "--mixed", "tp=1") == 0
    assert "2 prefill (TP 2, PP 1), 1 mixed (TP 1, PP 1), goodput" in capsys.readouterr().out


def test_a_trace_comes_whole_and_in_its_order(
    run: Run, core: Path, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "rows.csv"
    base = ("--profile", str(core), "--kv-bytes", "0", "--trace", str(job), "--requests", str(target))
    assert run(*base, "--time-scale", "2", "--json") == 0
    rows = list(csv.DictReader(target.read_text().splitlines()))
    assert [float(row["arrival_s"]) for row in rows] == [0.0, 0.2, 0.4]
    once = json.loads(capsys.readouterr().out)
    assert run(*base, "--time-scale", "2", "--json", "--step-by-step") == 0
    again = json.loads(capsys.readouterr().out)
    assert once["ttft_s"] == again["ttft_s"]
    assert once["tpot_s"] == again["tpot_s"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--profile", "nowhere.json"), "--profile nowhere.json: No such file"),
        (("--model", "bee"), "--model bee: "),
        (("--prefill", "tp=0"), "'tp=0' is not understood; write it as tp=2,pp=1,replicas=3"),
        (("--prefill", "tp=4"), "with tp=4,pp=1; what is known: tp=1,pp=1, tp=1,pp=2, tp=2,pp=1"),
        (("--mixed", "tp=1"), "there is --mode distserve-colocated"),
        (("--slo", "ttft=1ms,tpot=1"), "a request alone on this cluster takes"),
        (("--rate", "0"), "--rate '0.0': requests per second, greater than 0"),
        (("--trace", "nowhere.csv"), "nowhere.csv: No such file"),
        (("--count", "3", "--duration", "3"), "give either --duration or --count"),
    ],
)
def test_what_cannot_be_is_said(
    run: Run, profile: Path, job: Path, change: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*distserve(profile, job), *change) == 2
    assert said in capsys.readouterr().err


def test_profiles_of_the_other_kind_are_named(
    run: Run, profile: Path, core: Path, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*distserve(core, job)) == 2
    assert "needs a profile of DistServe's" in capsys.readouterr().err
    assert run("--profile", str(core), "--kv-bytes", "0", "--trace", str(job), "--decode", "tp=2") == 2
    assert "is a profile of one worker as it is" in capsys.readouterr().err
    assert run("--profile", str(core), "--trace", str(job)) == 2
    assert "--kv-bytes N is missing" in capsys.readouterr().err
    assert run("--profile", str(profile), "--kv-bytes", "0", "--trace", str(job)) == 2
    assert "--model NAME is missing: " in capsys.readouterr().err
    (tmp_path / "broken.json").write_text('{"zoo/ant": {"1": {"prefill": [1, 2]}}}')
    assert run(*distserve(tmp_path / "broken.json", job)) == 2
    assert "zoo/ant, tp=1: there must be prefill" in capsys.readouterr().err
