"""`prelay bench simulator` as it is typed."""

from __future__ import annotations

import json
import sys

import pytest

from bench import cli


def test_what_a_program_reads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "simulator", "--count", "30", "--pairs", "2", "--rounds", "1", "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert [job["name"] for job in result["jobs"]] == [
        "prelay, goodput", "prelay, least_loaded", "DistServe's rules",
    ]  # fmt: skip
    for job in result["jobs"]:
        assert job["least"] <= job["requests_s"] <= job["greatest"]
        assert job["complete"] == job["requests"] == 30
    assert result["requests_s"] == result["jobs"][0]["requests_s"]


def test_a_trace_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "simulator", "--trace", "nowhere.csv"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "nowhere.csv: No such file" in capsys.readouterr().err
