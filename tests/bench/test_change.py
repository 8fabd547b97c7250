"""Changes under load: what is written where, what is judged when, and a real one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench import cli
from bench.change import Change, Changed, Made
from cluster.workload.errors import BadInputError
from cluster.workload.jobs import Row, Status
from cluster.workload.slo import Slo
from tests.cluster.asking import LENIENT
from tests.cluster.conftest import start_server as start_server

if TYPE_CHECKING:
    from tests.cluster.conftest import Server

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def start(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bench", "change", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return start


def row(arrival_s: float, *, ttft_s: float = 0.1) -> Row:
    return Row(arrival_s, arrival_s, 10, 5, Status.COMPLETE, ttft_s, ttft_s + 0.4)


def test_a_change_is_a_time_and_a_command() -> None:
    assert Change.parse("20:role decode-0 mixed") == Change(20.0, ("role", "decode-0", "mixed"))
    assert str(Change.parse("1.5:scale prefill=1  decode=2")) == "scale prefill=1 decode=2"


@pytest.mark.parametrize(
    "text", ["", "20", "20:", "x:upgrade", "-1:upgrade", "nan:upgrade", "2:serve", "2:role '"]
)
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadInputError, match=r"write it as SECONDS:COMMAND, .* commands are role"):
        Change.parse(text)


def test_requests_are_judged_by_when_they_arrived() -> None:
    made = [
        Made(Change(10.0, ("upgrade",)), 10.0, 12.0),
        Made(Change(15.0, ("upgrade",)), 15.0, 16.0),
    ]
    rows = [row(9.0), row(11.0, ttft_s=5.0), row(14.0), row(17.0), row(19.0)]
    changed = Changed(Slo.fixed(1.0, 0.2), rows, made, 20.0)
    assert changed.phases() == {"before": (0.0, 10.0), "during": (10.0, 16.0), "after": (16.0, 20.0)}
    found = changed.to_json()["phases"]
    assert {name: (one["requests"], one["attainment"]) for name, one in found.items()} == {
        "before": (1, 1.0), "during": (2, 0.5), "after": (2, 1.0),
    }  # fmt: skip
    curve = {second: (rate, share) for second, rate, share in changed.curve()}
    assert curve[8.0] == (0.0, 1.0)
    assert curve[15.0] == (0.2, 0.5), "those of 10 to 15 s"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--at", "70:upgrade"], "the load ends after --duration 60"),
        (["--at", "7:serve"], "commands are role"),
        (["--at", "7:upgrade", "--rate", "0"], "greater than 0"),
        (["--at", "7:upgrade", "--plot", "/nowhere/x.png"], "there is no directory /nowhere"),
        ([], "Missing option '--at'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    load = ["--url", "http://127.0.0.1:1", "--dataset", "synthetic:prompt=8,answer=4", "--rate", "1"]
    assert run(*load, *arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.ray
def test_roles_change_under_load(
    run: Run, start_server: Callable[..., Server], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    server = start_server("--prefill", "1", "--decode", "1", *LENIENT)
    ready = server.ready()
    load = [
        "--url", f"grpc://{ready['grpc']}", "--admin", ready["admin"], "--rate", "8", "--duration", "9",
        "--dataset", "synthetic:prompt=20-40,answer=10-20", "--slo", "ttft=30,tpot=1",
    ]  # fmt: skip
    plot = tmp_path / "change.png"
    changes = ["--at", "6:role decode-0 decode", "--at", "3:role decode-0 mixed"]
    assert run(*load, *changes, "--json", "--plot", str(plot)) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["command"] for one in found["changes"]] == ["role decode-0 mixed", "role decode-0 decode"]
    assert found["changes"][0]["lines"][0][1] == "decode-0 is a mixed worker now, in the same life"
    assert found["changes"][0]["began_s"] >= 3.0
    assert all(phase["attainment"] == 1.0 for phase in found["phases"].values()), "nothing is lost"
    assert plot.stat().st_size > 10_000

    assert run(*load, "--at", "1:role nobody mixed") == 1
    assert "`prelay role nobody mixed` ended with exit code 2: prelay: error: there is no worker" in (
        capsys.readouterr().err
    )
    assert run(*load, "--at", "1:drain decode-0") == 1, "nobody could write answers then"
