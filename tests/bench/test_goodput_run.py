"""Rounds over deployments that exist on paper: what is measured, what is not again, and what comes out."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from bench.goodput.experiment import Experiment
from bench.goodput.plan import plan_of
from bench.goodput.plane import map_plan, map_tables, measure_map
from bench.goodput.plots import draw_goodput, draw_map
from bench.goodput.record import Record
from bench.goodput.report import result_of, tables
from bench.goodput.run import measure_rounds
from bench.goodput.venue import THIS_MACHINE
from cluster.config import ServeConfig, demo_model_path
from cluster.workload.errors import BadInputError
from tests.bench.goodput_bench import PaperBench, experiment, quiet

SHAPES = Path(__file__).parent.parent.parent / "bench" / "shapes"
ABOUT = {"machine": "paper"}


def knee(config: ServeConfig) -> float:
    """The pair serves 8 requests/s, first come first served 4, colocated most with steps of 128 tokens."""
    by_policy = {"goodput": 8.0, "least_loaded": 4.0}
    by_chunk = {64: 2.0, 128: 4.0, 256: 1.0}
    return by_policy.get(config.router.policy) or by_chunk[config.mixed.max_batch_tokens]


def measured(one: Experiment, folder: Path) -> tuple[dict[str, Any], Record]:
    """The whole run of an experiment, from the file on."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    record = Record.open(folder / "record.json", one, ABOUT)
    plan = plan_of(one, SHAPES, folder, work)
    curves = asyncio.run(measure_rounds(plan, record, quiet()))
    return result_of(curves, record, {"about": ABOUT}), record


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> PaperBench:
    bench = PaperBench(knee)
    bench.install(monkeypatch)
    return bench


def test_goodput_is_found_and_compared(bench: PaperBench, tmp_path: Path) -> None:
    result, _ = measured(experiment(demo_model_path()), tmp_path)
    json.dumps(result, allow_nan=False)
    (workload,) = result["workloads"]
    assert result["devices"] == 2
    assert (workload["name"], workload["slo"]["ttft_s"]) == ("short", pytest.approx(0.3))
    assert workload["slo"]["tpot_s"] == pytest.approx(0.02), "twice the faster one's 10 ms"
    found = {one["name"]: one for one in workload["deployments"]}
    # 90 % is where 1.1 of the knee is offered: between places of the grid, so not to the last digit.
    assert found["pair"]["goodput_per_device_90"] == pytest.approx(1.1 * 8 / 2, rel=0.02)
    assert found["fcfs"]["goodput_per_device_90"] == pytest.approx(1.1 * 4 / 2, rel=0.02)
    assert found["mixed"]["goodput_per_device_90"] == pytest.approx(1.1 * 4 / 2, rel=0.02)
    assert found["mixed"]["setting_90"] == "mixed.max_batch_tokens=128"
    assert found["pair"]["goodput_per_device_99"] == pytest.approx(1.01 * 8 / 2, rel=0.06)
    low, high = found["pair"]["ci90"]
    assert low <= found["pair"]["goodput_per_device_90"] <= high
    assert found["pair"]["policy"] == "goodput"
    assert 0.9 <= found["pair"]["attainment_by_length"]["<512"] <= 1.0
    assert found["pair"]["at_crossing"]["stages_s"] == {"prefill": 0.1, "decode": 0.2}
    points = found["pair"]["at_crossing"]["counted"]
    asked = points["admission.accepted.none"] + points["admission.rejected.late"]
    assert found["pair"]["at_crossing"]["false_refusals"] == pytest.approx(
        points["could_have_served"] / asked
    )


@pytest.mark.slow
def test_the_search_for_99_can_be_left_out_and_made_up_for(bench: PaperBench, tmp_path: Path) -> None:
    whole = experiment(demo_model_path())
    without = whole.model_copy(update={"measure": whole.measure.model_copy(update={"search_99": False})})
    short, record = measured(without, tmp_path)
    number = len(record.points)
    complete, record = measured(whole, tmp_path)
    assert len(record.points) > number, "the rest of the same search"
    for before, after in zip(
        short["workloads"][0]["deployments"], complete["workloads"][0]["deployments"], strict=True
    ):
        assert before["goodput_per_device_90"] == pytest.approx(after["goodput_per_device_90"], rel=0.02)


def test_every_round_visits_all_in_an_order_of_its_own(bench: PaperBench, tmp_path: Path) -> None:
    measure = {"rounds": 6, "seconds": 50.0, "min_requests": 1, "warmup_s": 0.0}
    measured(experiment(demo_model_path(), measure=measure), tmp_path)
    references, visits = bench.started[:2], bench.started[2:]
    assert {policy for policy, _ in references} == {"round_robin", "colocated"}
    by_round = [visits[:5], *(visits[5 + 3 * number : 8 + 3 * number] for number in range(5))]
    assert sum(map(len, by_round)) == len(visits)
    for one in by_round:
        assert {policy for policy, _ in one} == {"goodput", "least_loaded", "colocated"}
    assert len({tuple(policy for policy, _ in one) for one in by_round[1:]}) > 1
    # Only the best chunk size goes on after the first round.
    assert {chunk for policy, chunk in by_round[0] if policy == "colocated"} == {64, 128, 256}
    assert {chunk for one in by_round[1:] for policy, chunk in one if policy == "colocated"} == {128}
    seeds = {seed for policy, _, seed in bench.measured if policy == "goodput"}
    assert seeds == set(range(6))


def test_values_that_are_beaten_are_dropped_at_once(bench: PaperBench, tmp_path: Path) -> None:
    """The best one is searched for in full, and those that come after it get a point each."""
    result, record = measured(experiment(demo_model_path()), tmp_path)
    found = next(one for one in result["workloads"][0]["deployments"] if one["name"] == "mixed")
    assert len(found["settings"]) == 3
    first = [point for point in record.points if point.of.deployment == "mixed" and point.round == 0]
    order = list(dict.fromkeys(point.of.setting for point in first))
    later = order[order.index("mixed.max_batch_tokens=128") + 1 :]
    assert later, "the seed makes it come before another"
    for setting in later:
        (only,) = [point for point in first if point.of.setting == setting]
        assert only.rate <= 1.1 * 4


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on(
    bench: PaperBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = experiment(demo_model_path())
    (tmp_path / "whole").mkdir()
    whole, _ = measured(one, tmp_path / "whole")
    everything = bench.measured[:]
    cut = PaperBench(knee, fails_after=7)
    cut.install(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        measured(one, tmp_path)
    assert len(Record.open(tmp_path / "record.json", one, ABOUT).points) == 7
    rest = PaperBench(knee)
    rest.install(monkeypatch)
    resumed, record = measured(one, tmp_path)
    assert cut.measured + rest.measured == everything, "nothing twice, nothing left out"
    assert len(record.points) == len(everything)
    assert resumed["workloads"] == whole["workloads"]
    again = PaperBench(knee)
    again.install(monkeypatch)
    measured(one, tmp_path)
    assert again.started == []


@pytest.mark.slow
def test_more_rounds_add_to_what_is_there(bench: PaperBench, tmp_path: Path) -> None:
    one = experiment(demo_model_path())
    measured(one, tmp_path)
    before = len(bench.measured)
    more = one.model_copy(update={"measure": one.measure.model_copy(update={"rounds": 3})})
    _, record = measured(more, tmp_path)
    assert {seed for _, _, seed in bench.measured[before:]} == {2}
    assert {point.round for point in record.points} == {0, 1, 2}


def test_a_line_that_was_cut_off_is_dropped(bench: PaperBench, tmp_path: Path) -> None:
    one, path = experiment(demo_model_path()), tmp_path / "record.json"
    _, record = measured(one, tmp_path)
    whole = path.read_text()
    path.write_text(whole[:-100])
    again = Record.open(path, one, ABOUT)
    assert len(again.points) == len(record.points) - 1
    again.add_point(record.points[-1])
    assert path.read_text() == whole
    path.write_text(whole[:-1])
    assert len(Record.open(path, one, ABOUT).points) == len(record.points)
    assert path.read_text() == whole


def test_a_file_of_something_else_is_refused(bench: PaperBench, tmp_path: Path) -> None:
    one, path = experiment(demo_model_path()), tmp_path / "record.json"
    measured(one, tmp_path)
    other = one.model_copy(update={"measure": one.measure.model_copy(update={"seconds": 5.0})})
    with pytest.raises(BadInputError, match=r"another measure\.seconds"):
        Record.open(path, other, ABOUT)
    slower = {"short": one.workloads["short"].model_copy(update={"slo": "ttft=9x,tpot=9x"})}
    with pytest.raises(BadInputError, match=r"another workloads\.short"):
        Record.open(path, one.model_copy(update={"workloads": slower}), ABOUT)
    fewer = one.model_copy(update={"deployments": {"pair": one.deployments["pair"]}})
    assert Record.open(path, fewer, ABOUT).points
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "nonsense\n", *lines[1:]]))
    with pytest.raises(BadInputError, match="line 2"):
        Record.open(path, one, ABOUT)
    path.write_text("{}\n{}\n")
    with pytest.raises(BadInputError, match="line 1"):
        Record.open(path, one, ABOUT)
    path.write_text(json.dumps({"kind": "point"}) + "\n")
    with pytest.raises(BadInputError, match="not a file that"):
        Record.open(path, one, ABOUT)


def test_tables_and_plots_can_be_made_of_a_result(bench: PaperBench, tmp_path: Path) -> None:
    result, _ = measured(experiment(demo_model_path()), tmp_path)
    (table,) = tables(result)
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["pair", "fcfs", "mixed"]
    assert [float(ratio) for ratio in cells[5]] == [
        pytest.approx(2.0, abs=0.05), pytest.approx(0.5, abs=0.05), pytest.approx(0.5, abs=0.05)
    ]  # fmt: skip
    draw_goodput(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


MAP = {
    "lengths": [{"prompt": 64, "answer": 4}, {"prompt": 32, "answer": 32}],
    "ttft": ["3x", "1x"],
    "tpot": ["2x"],
    "deployments": ["pair", "fcfs", "mixed"],
}


def test_a_map_judges_again_what_does_not_look_at_limits(bench: PaperBench, tmp_path: Path) -> None:
    one = experiment(demo_model_path(), map=MAP, measure={"rounds": 1, "seconds": 100.0, "min_requests": 1})
    record = Record.open(tmp_path / "record.json", one, ABOUT)
    work = tmp_path / "work"
    work.mkdir()
    result = asyncio.run(measure_map(map_plan(one, SHAPES, work), record, quiet(), THIS_MACHINE))
    json.dumps(result, allow_nan=False)
    assert [plane["name"] for plane in result["planes"]] == ["64:4", "32:32"]
    starts = [policy for policy, _ in bench.started[2:]]
    assert starts.count("goodput") == 4, "a start for each cell of each plane"
    assert starts.count("least_loaded") == 2, "one for each plane"
    for plane in result["planes"]:
        for cell in plane["cells"]:
            values = {served["name"]: served["goodput_per_device_90"] for served in cell["deployments"]}
            assert values["pair"] == pytest.approx(4.4, rel=0.02)
            assert values["fcfs"] == pytest.approx(2.2, rel=0.02)
            assert values["mixed"] == pytest.approx(2.2, rel=0.02)
            assert cell["best"] == "pair"
            assert cell["ratio"] == pytest.approx(2.0, rel=0.03)
    assert len(list(map_tables(result))) == 2
    draw_map(result, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 10_000


def test_limits_that_nobody_meets_leave_a_cell_empty(
    bench: PaperBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone a request takes 0.1 s, under any load 0.2 s: the limit of 1x is out of reach."""
    PaperBench(knee, ttft_s=0.2, alone_s=0.1).install(monkeypatch)
    one = experiment(demo_model_path(), map=MAP, measure={"rounds": 1, "seconds": 100.0, "min_requests": 1})
    record = Record.open(tmp_path / "record.json", one, ABOUT)
    work = tmp_path / "work"
    work.mkdir()
    result = asyncio.run(measure_map(map_plan(one, SHAPES, work), record, quiet(), THIS_MACHINE))
    wide, tight = result["planes"][0]["cells"]
    assert wide["ratio"] == pytest.approx(2.0, rel=0.03)
    assert (tight["best"], tight["ratio"]) == (None, None)
    assert {served["bound_90"] for served in tight["deployments"]} == {"<"}
    draw_map(result, tmp_path / "map.png")
