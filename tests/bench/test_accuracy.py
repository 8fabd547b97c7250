"""The simulator's twin of a deployment, and what it learns from a light run. Nothing is started here."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.accuracy.case import Case, seed_of
from bench.accuracy.correction import Spent, correct
from bench.accuracy.report import table, to_json
from bench.accuracy.run import Compare, Compared
from bench.goodput.experiment import load_experiment
from bench.goodput.plan import plan_of
from bench.goodput.points import Point
from bench.simulate.twin import Correction, Twin
from cluster.workload.errors import BadInputError
from cluster.workload.judge import judge
from cluster.workload.slo import Limits
from engine.latency import LatencyModel
from router.pool_view import Role

BENCH = Path(__file__).parents[2] / "bench"
PROFILE = LatencyModel({"step": 0.004, "rows": 7e-4, "decode_sequences": 1.5e-3, "decode_context": 2e-6})


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    experiment = load_experiment(BENCH / "accuracy" / "two-cores.yaml")
    plan = plan_of(experiment, BENCH / "shapes", Path(), tmp_path_factory.mktemp("plan"))
    return {
        name: Case(plan.sources[0], variants[0], Limits(2.0, 0.03), experiment.measure, PROFILE)
        for name, variants in plan.variants.items()
    }


def at(case: Case, rate: float, number: int, correction: Correction) -> Point:
    """A point as if the cluster were the twin with that correction."""
    rows = case.simulated(rate, seed_of(number), correction)
    duration_s = 100 / rate
    said = judge(rows, case.slo, duration_s).to_json()
    return Point(case.setting, number, 0, rate, case.limits, duration_s, rows, said)


@pytest.mark.parametrize("name", ["disaggregated", "colocated"])
def test_a_light_run_teaches_what_a_cluster_adds(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    truth = Correction(1.2, 1.2 if name == "colocated" else 1.4, 0.003)
    found = case.corrected(at(case, 0.4, -1, truth))
    assert found.reading == pytest.approx(truth.reading, rel=0.03)
    assert found.writing == pytest.approx(truth.writing, rel=0.03)
    assert found.message_s == pytest.approx(truth.message_s, abs=0.001)


def test_without_an_answer_there_is_nothing_to_learn(cases: dict[str, Case]) -> None:
    case = cases["disaggregated"]
    empty = Point(case.setting, -1, 0, 0.4, case.limits, 1.0, [], judge([], case.slo, 1.0).to_json())
    assert case.corrected(empty) == Correction()
    assert correct(Spent(1, 1, 1), lambda correction: None, 4, are_apart=True) == Correction()


def test_corrections_stay_within_reason() -> None:
    found = correct(Spent(100.0, 0.001, -5.0), lambda one: Spent(1.0, 1.0, 0.0), 4, are_apart=True)
    assert found.reading == 5.0
    assert found.writing == 0.2
    assert found.message_s > 0


def test_the_twin_has_what_the_deployment_has(cases: dict[str, Case]) -> None:
    cluster = Twin(cases["disaggregated"].variant.config, PROFILE, Correction(2.0, 3.0, 0.001)).cluster(60.0)
    reader, writer = cluster.workers
    assert (reader.role, writer.role, cluster.policy) == (Role.PREFILL, Role.DECODE, "goodput")
    assert (reader.kv_tokens, writer.kv_tokens) == (32768, 65536)
    assert reader.kv_bytes == 2 * 30 * 3 * 64 * 2
    assert reader.latency.prefill_s(512) == pytest.approx(2 * PROFILE.prefill_s(512))
    assert writer.latency.decode_s(4, 2000) == pytest.approx(3 * PROFILE.decode_s(4, 2000))
    mixed = Twin(cases["colocated"].variant.config, PROFILE, Correction()).cluster(60.0)
    assert [(one.role, one.max_num_seqs, one.max_batch_tokens) for one in mixed.workers] == [
        (Role.MIXED, 32, 512)
    ] * 2


def test_room_that_is_left_open_is_refused(cases: dict[str, Case]) -> None:
    config = cases["disaggregated"].variant.config
    pool = config.prefill.model_copy(update={"kv_cache_tokens": None})
    with pytest.raises(BadInputError, match=r"prefill\.kv_cache_tokens is not given"):
        Twin(config.model_copy(update={"prefill": pool}), PROFILE, Correction()).cluster(60.0)


@pytest.mark.slow
def test_saturation_lies_between_what_is_good_and_what_is_not(cases: dict[str, Case]) -> None:
    case = cases["disaggregated"]
    rate = case.saturation(Correction())

    def attained(share: float) -> float:
        return judge(case.simulated(share * rate, 0, Correction()), case.slo, 1.0).attainment

    assert attained(0.5) > 0.9 > attained(2.0)


def test_the_report_says_how_far_the_two_are_apart(cases: dict[str, Case]) -> None:
    case = cases["disaggregated"]
    light, heavy = (judge(case.simulated(rate, 0, Correction()), case.slo, 100.0) for rate in (0.5, 3.0))
    rows = [
        Compared(case, 0.5, 0.5, light, light, light),
        Compared(case, 3.0, 1.5, light, heavy, light),
    ]
    found = to_json([Compare(case, Correction(), 1.0, rows)])
    wrong = 100 * (light.attainment - heavy.attainment)
    assert wrong > 10
    assert found["max_error_points"] == found["max_error_points_beyond"] == pytest.approx(wrong)
    assert found["max_error_points_below"] == 0
    assert [row["error_points"] for row in found["rows"]] == [0, pytest.approx(wrong)]
    assert found["rows"][0]["ttft_p90_error"] == 0
    assert found["max_error_of_times"]["ttft_p90"] == 0
    assert table([Compare(case, Correction(), 1.0, rows)]).row_count == 2
