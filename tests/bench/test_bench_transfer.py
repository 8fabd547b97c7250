"""`prelay bench transfer`: a tiny run through everything, and the processes that it measures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from bench import cli, cli_engine
from bench.errors import MeasurementError
from bench.handoff import BATCH, BatchSteps, HandOff, Round, _turns
from bench.pair_worker import Step
from bench.processes import Remote
from bench.pulls import measure_pulls
from bench.transfer import _exposed_row, _slowdown_row, _tp_size
from transfer.layout import WorkerLayout

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 4096,
}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", "transfer", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(TINY))
    monkeypatch.setattr(cli_engine, "SHAPES", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("shapes")
def test_one_json_object_and_a_plot(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plot = tmp_path / "transfer.png"
    arguments = ["--shape", "tiny", "--backends", "ipc", "--mb", "1", "--prompts", "32,160"]
    assert run(monkeypatch, *arguments, "--rounds", "1", "--json", "--plot", str(plot)) == 0
    result: dict[str, Any] = json.loads(capfd.readouterr().out)
    assert (result["shape"], result["dtype"], result["rounds"]) == ("tiny", "bfloat16", 1)
    assert [(row["name"], row["mb"], row["limit"]) for row in result["backends"]] == [("ipc", 1, "memcpy")]
    for row in result["backends"]:
        assert row["num_blocks"] == 256
        assert row["unequal"]["source_tp"] == 2
        for case in (row, row["scattered"], row["unequal"]):
            assert case["gbps"] > 0
            assert case["share_of_limit"] > 0
        assert row["latency_ms"] == pytest.approx(256 * 4096 / row["gbps"] / 1e6)
    assert [(row["backend"], row["prompt_tokens"]) for row in result["exposed"]] == [
        ("ipc", 32),
        ("ipc", 160),
    ]
    for row in result["exposed"]:
        for case in (row, row["busy"]):
            assert min(case["overlap_ms"], case["no_overlap_ms"], case["prefill_ms"]) > 0
            assert case["goal_ms"] == pytest.approx(case["decode_step_ms"] + 0.05 * case["prefill_ms"])
    assert result["decode_step_slowdown"] == result["slowdown"][0]["ratio"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shape", "huge"], "there is no shape 'huge'; there are tiny"),
        (["--shape", "tiny", "--backends", "ipc,pigeon"], "'pigeon': there are ipc, torchdist, nixl"),
        (["--shape", "tiny", "--backends", ""], "--backends is empty"),
        (["--shape", "tiny", "--mb", "x"], "--mb 'x': numbers of at least 1"),
        (["--shape", "tiny", "--prompts", ""], "each need a number"),
        (["--shape", "tiny", "--plot", "/no/such/place/x.png"], "there is no directory /no/such/place"),
    ],
)
@pytest.mark.usefixtures("shapes")
def test_nonsense_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    assert run(monkeypatch, *arguments) == 2
    captured = capfd.readouterr()
    assert complaint in captured.err
    assert not captured.out


@pytest.mark.usefixtures("shapes")
def test_two_cores_are_needed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli_engine.os, "sched_getaffinity", lambda pid: {3})
    assert run(monkeypatch, "--shape", "tiny") == 2
    assert "two cores are needed" in capfd.readouterr().err


@pytest.mark.usefixtures("shapes")
def test_a_failed_measurement_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise MeasurementError("the worker is gone")

    monkeypatch.setattr("bench.transfer.measure", fail)
    assert run(monkeypatch, "--shape", "tiny", "--backends", "ipc") == 1
    assert capfd.readouterr().err.endswith("prelay: error: the worker is gone\n")


def echo(connection: Connection, word: str) -> None:
    connection.send(word)
    while (number := connection.recv()) is not None:
        connection.send(10 // number)


@pytest.fixture
def remote() -> Iterator[Remote]:
    made = Remote("echo", 0, echo, "ready")
    yield made
    made.stop()


def test_a_process_answers_until_it_fails_and_says_why(remote: Remote) -> None:
    assert remote.take() == "ready"
    assert remote.ask(5) == 2
    with pytest.raises(MeasurementError, match=r"(?s)process echo failed:.*ZeroDivisionError"):
        remote.ask(0)
    with pytest.raises(MeasurementError, match="has ended with exit code 0"):
        remote.ask(5)


@pytest.mark.parametrize("backend", ["ipc", pytest.param("torchdist", marks=pytest.mark.slow)])
def test_pulls_of_several_sizes_in_rounds(backend: str) -> None:
    layouts = [
        WorkerLayout(num_layers=2, num_kv_heads=2, head_dim=8, block_size=4, dtype="bfloat16", tp_size=size)
        for size in (2, 1)
    ]
    told: list[int] = []
    rounds = measure_pulls(backend, layouts[0], layouts[1], [3, 8], 2, (0, 0), told.append)
    assert told == [0, 1, 2]
    assert [len(cases) for cases in rounds] == [2, 2]
    assert all(min(case.pull_s, case.scattered_s, case.limit_s) > 0 for cases in rounds for case in cases)


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (2, 2), (3, 3), (8, 2), (9, 3)])
def test_heads_are_split_evenly(heads: int, size: int) -> None:
    assert _tp_size(heads) == size


def test_rows_are_medians_of_rounds_in_ms() -> None:
    def hand_off(exposed_s: float) -> HandOff:
        return HandOff(exposed_s, 0.5, 0.01, 0.001, 0.002)

    exposed = {"overlap": (0.002, 0.003, 0.009), "whole": (0.02, 0.04, 0.03)}
    rounds = [
        Round(
            {
                (512, mode, is_busy): hand_off(times[number] * (2 if is_busy else 1))
                for mode, times in exposed.items()
                for is_busy in (False, True)
            },
            BatchSteps(0.020, 0.021 if number else None, (0.021, 0.022, 0.030)[number]),
        )
        for number in range(3)
    ]
    row = _exposed_row("ipc", 512, rounds)
    assert (row["backend"], row["prompt_tokens"]) == ("ipc", 512)
    assert (row["overlap_ms"], row["no_overlap_ms"]) == pytest.approx((3, 30))
    assert (row["busy"]["overlap_ms"], row["busy"]["no_overlap_ms"]) == pytest.approx((6, 60))
    assert (row["decode_step_ms"], row["prefill_ms"], row["goal_ms"]) == pytest.approx((10, 500, 35))
    assert row["overlap_spread"] == pytest.approx({"min": 2, "median": 3, "max": 9})
    slowdown = _slowdown_row("ipc", rounds)
    assert (slowdown["ratio"], slowdown["alone_ms"], slowdown["beside_prefill_ms"]) == pytest.approx(
        (1.1, 20, 21)
    )


def test_turns_go_from_end_to_end_of_steps_of_the_whole_batch() -> None:
    sizes = [BATCH, BATCH, BATCH + 1, BATCH, BATCH]
    steps = [Step(float(at), at + 0.5, size, size) for at, size in enumerate(sizes)]
    assert _turns(steps) == [(0.5, 1.5), (3.5, 4.5)]
