"""The commands as a user meets them: tiny runs, and what they say of nonsense."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import cli, cli_engine
from engine.latency import LatencyModel

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 256,
}
ENGINE = [
    "engine",
    "--shape",
    "tiny",
    "--prefill",
    "8,16",
    "--decode",
    "1,2",
    "--context",
    "16",
    "--rounds",
    "2",
]
PROFILE = ["profile", "--shape", "tiny", "--max-batch-tokens", "32", "--max-num-seqs", "4"]

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """`python -m bench ...` in this process, with a tiny shape beside no other; returns the exit code."""
    (tmp_path / "shapes" / "tiny").mkdir(parents=True)
    (tmp_path / "shapes" / "tiny" / "config.json").write_text(json.dumps(TINY))
    monkeypatch.setattr(cli_engine, "SHAPES", tmp_path / "shapes")
    cores = os.sched_getaffinity(0)

    def run_main(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    yield run_main
    os.sched_setaffinity(0, cores)


def test_engine_prints_one_json_object_and_draws(
    run: Run, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plot = tmp_path / "engine.png"
    assert run(*ENGINE, "--json", "--plot", str(plot)) == 0
    result: dict[str, Any] = json.loads(capfd.readouterr().out)
    assert (result["shape"], result["dtype"], result["threads"]) == ("tiny", "bfloat16", 1)
    assert result["ready_s"] > 0
    assert result["limits"]["gemm_gflops"] > 0
    assert result["limits"]["read_gbps"] > 0
    assert [row["tokens"] for row in result["prefill"]] == [8, 16]
    assert [(row["batch"], row["context"]) for row in result["decode"]] == [(1, 16), (2, 16)]
    for row in (*result["prefill"], *result["decode"]):
        assert row["tok_s_spread"]["min"] <= row["tok_s"] <= row["tok_s_spread"]["max"]
        assert row["ratio_spread"]["min"] <= row["ratio"] <= row["ratio_spread"]["max"]
        assert row["share_of_limit"] > 0
        assert row["transformers_tok_s"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_without_transformers_there_is_no_ratio(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(*ENGINE, "--no-transformers") == 0
    table = capfd.readouterr().out
    assert "prefill 16" in table
    assert "decode 2 x 16" in table


def test_profile_writes_what_a_latency_model_reads(
    run: Run, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target, plot = tmp_path / "profile.json", tmp_path / "profile.png"
    arguments = ["--max-context", "64", "--repeats", "1", "--json", str(target), "--plot", str(plot)]
    assert run(*PROFILE, *arguments) == 0
    written = json.loads(target.read_text())
    model = LatencyModel.from_json(written["latency"])
    assert model.prefill_s(16) > 0
    assert written["model"] == "tiny"
    assert written["error"].keys() == {"median", "p95"}
    assert len(written["samples"]["fitted"]) > 10
    assert written["samples"]["held_out"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "median error" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["engine", "--shape", "huge"], "there is no shape 'huge'; there are tiny"),
        (["engine"], "either --shape NAME or --model DIR"),
        (["engine", "--shape", "tiny", "--model", "x"], "either --shape NAME or --model DIR"),
        (["engine", "--shape", "tiny", "--prefill", "8,x"], "--prefill '8,x': numbers of at least 1"),
        (["engine", "--shape", "tiny", "--prefill", "", "--decode", ""], "nothing to measure"),
        (["engine", "--shape", "tiny", "--threads", "4096"], "--threads 4096, but there are only"),
        (
            ["engine", "--shape", "tiny", "--plot", "/no/such/place/x.png"],
            "there is no directory /no/such/place",
        ),
        (
            ["profile", "--shape", "tiny", "--json", "/no/such/place/x"],
            "there is no directory /no/such/place",
        ),
        (["profile", "--shape", "tiny", "--repeats", "0"], "0 is not in the range"),
        (["race"], "No such command 'race'"),
    ],
)
def test_nonsense_is_refused_before_anything_is_measured(
    run: Run, capfd: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert run(*arguments) == 2
    captured = capfd.readouterr()
    assert complaint in captured.err
    assert captured.err.startswith("prelay: error: ")
    assert not captured.out


def test_a_directory_without_a_model_is_said_so(
    run: Run, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("engine", "--model", str(tmp_path), "--no-transformers") == 4
    assert "config.json is missing" in capfd.readouterr().err


@pytest.mark.parametrize("missing", ["matplotlib", "transformers"])
def test_a_missing_library_is_named_with_the_extra_that_has_it(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name)
    )
    assert run(*ENGINE, "--plot", str(tmp_path / "x.png")) == 2
    assert f"{missing}" in (told := capfd.readouterr().err)
    assert "pip install 'prelay[bench]'" in told


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["bench"], "prelay bench"),
        (["bench", "engine"], "prelay bench engine"),
        (["profile"], "prelay profile"),
    ],
)
def test_help_is_said_under_the_commands_own_name(arguments: list[str], name: str) -> None:
    command = [sys.executable, "-m", "cluster.cli", *arguments, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"Usage: {name}" in done.stdout
