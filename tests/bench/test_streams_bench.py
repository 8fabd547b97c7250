"""`prelay bench streams`, small: what it counts, and that the router it looks at is left empty."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import cli
from bench.streams import Look, slope_mb_min


def look(at_s: float, memory_mb: float) -> Look:
    return Look(at_s, memory_mb, 10, 5, 1, 0, 100.0, 1.0, 2.0, 0.1)


def test_growth_is_that_of_the_settled_part() -> None:
    warming = [look(10.0, 50.0), look(20.0, 90.0)]
    settled = [look(30.0 + 10 * n, 100.0 + n) for n in range(20)]
    assert slope_mb_min([*warming, *settled]) == pytest.approx(6.0)
    assert slope_mb_min(warming) == 0.0


@pytest.mark.slow
def test_clients_come_and_go_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plot = tmp_path / "streams.png"
    small = ["--streams", "300", "--seconds", "12", "--answer", "24", "--tokens", "2000", "--leaves", "0.5"]
    monkeypatch.setattr(sys, "argv", ["bench", "streams", *small, "--json", "--plot", str(plot)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["left_behind"] == 0
    assert found["answers"] > 50
    assert found["left"] > 50
    assert max(one["live"] for one in found["looks"]) <= 300 + 100, (
        "those that have just been left count, too"
    )
    assert found["memory_mb"]["most"] > 10
    assert plot.stat().st_size > 5_000
