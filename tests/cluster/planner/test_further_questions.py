"""What if, and the cheapest plan for a rate."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from cluster.planner.cheapest import cheapest
from cluster.planner.errors import NoPlanError
from cluster.planner.hardware import GPUS, Devices, Hardware
from cluster.planner.kinds import Kind
from cluster.planner.plans import Plan, Pool
from cluster.planner.question import Question
from cluster.planner.search import Answer, apart, measure_plan, search
from cluster.planner.sensitivity import sensitivity
from cluster.workload.arrivals import Arrivals
from cluster.workload.datasets import load_dataset
from cluster.workload.drawing import WorkloadSpec
from cluster.workload.judge import Outcome
from cluster.workload.slo import Slo
from engine.latency import LatencyModel
from router.pool_view import Role

GPU = GPUS["a100-80g"]
KIND = Kind(
    GPU, 1, 1, LatencyModel({"step": 0.02, "rows": 2e-4, "decode_context": 6e-7}), 60_000, 100_000,
    is_measured=True,
)  # fmt: skip
QUESTION = Question(
    WorkloadSpec(load_dataset("synthetic:prompt=500,answer=40"), Arrivals.parse("poisson"), range(0)),
    Slo.fixed(0.4, 0.05),
    Hardware([Devices(GPU, 4)]),
    count=60,
    seeds=(0,),
    settle_s=5.0,
)
PAIR = Plan((Pool(Role.PREFILL, KIND, 1), Pool(Role.DECODE, KIND, 1)))


def silent(done: float, said: str) -> None:
    """Nobody is told."""


@pytest.fixture(scope="module")
def answer() -> Answer:
    with ThreadPoolExecutor(1) as executor:
        return search(QUESTION, [KIND], executor, silent)


@pytest.mark.slow
def test_what_if(answer: Answer) -> None:
    with ThreadPoolExecutor(1) as executor:
        found = sensitivity(QUESTION, answer, executor, silent)
    longer, slower = found.changed
    assert longer.what == "prompts twice as long"
    assert longer.of_before < 0.8
    slow = replace(QUESTION, link_scale=0.5)
    winner = slower.winner_before
    assert slower.of_before == measure_plan(slow, winner.plan, slower.before.rate).rate / slower.before.rate
    assert found.at_twice < 0.9
    for one in found.changed:
        assert {finalist.plan for finalist in one.finalists} == {one.plan for one in answer.finalists}
        assert one.finalists[0].value == max(finalist.value for finalist in one.finalists)


@pytest.mark.slow
def test_the_cheapest_is_enough_and_one_less_is_not(answer: Answer) -> None:
    rate = 0.45 * answer.finalists[0].rate
    with ThreadPoolExecutor(1) as executor:
        found = cheapest(QUESTION, answer, rate, executor, silent)
    assert [one.cost for one in found] == sorted(one.cost for one in found)
    best = found[0]
    assert best.attainment >= QUESTION.target
    assert best.plan.devices < 4
    unit, times = best.plan.unit()
    outcomes = QUESTION.outcomes(unit, rate / times, 0)
    assert outcomes[Outcome.GOOD] / outcomes.total() == best.attainment
    for pool in best.plan.pools:
        if pool.replicas > 1:
            fewer = replace(pool, replicas=pool.replicas - 1)
            less = replace(best.plan, pools=tuple(fewer if one is pool else one for one in best.plan.pools))
            outcomes = QUESTION.outcomes(less, rate, 0)
            assert outcomes[Outcome.GOOD] < QUESTION.target * outcomes.total()


@pytest.mark.slow
def test_too_much_for_all_devices_is_said(answer: Answer) -> None:
    rate = 3 * answer.finalists[0].rate
    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(NoPlanError, match=r"of 4 devices the best plan serves .*; give about 1[0-4] devices"),
    ):
        cheapest(QUESTION, answer, rate, executor, silent)


def test_prompts_that_grow() -> None:
    longer = replace(QUESTION, prompt_scale=2.0)
    assert longer.mean_prompt == 2 * QUESTION.mean_prompt
    assert longer.longest == 2 * 500 + 40
    assert longer.outcomes(PAIR, 6.0, 0)[Outcome.GOOD] < QUESTION.outcomes(PAIR, 6.0, 0)[Outcome.GOOD]


def test_without_transfer_or_memory_more_are_good() -> None:
    small = replace(KIND, kv_tokens=1_200)
    tight = Plan((Pool(Role.PREFILL, KIND, 1), Pool(Role.DECODE, small, 1)))
    assert (
        replace(QUESTION, has_memory=False).outcomes(tight, 4.0, 0)[Outcome.GOOD]
        > QUESTION.outcomes(tight, 4.0, 0)[Outcome.GOOD]
    )
    slow = replace(QUESTION, link_scale=1e-4)
    assert slow.link_bytes_per_s(PAIR) == pytest.approx(1e-4 * QUESTION.link_bytes_per_s(PAIR))
    assert (
        replace(slow, has_transfer=False).outcomes(PAIR, 4.0, 0)[Outcome.GOOD]
        > slow.outcomes(PAIR, 4.0, 0)[Outcome.GOOD]
    )


def test_a_worker_runs_with_its_own_step_sizes() -> None:
    own = replace(KIND, batch_tokens=300, num_seqs=20)
    reader, writer = Plan((Pool(Role.PREFILL, own, 1), Pool(Role.DECODE, own, 1))).cluster(1e9).workers
    assert reader.max_batch_tokens == writer.max_batch_tokens == 300
    assert writer.max_num_seqs == 20


@pytest.mark.slow
def test_apart_is_the_slower_phase(answer: Answer) -> None:
    (phases,) = answer.phases
    assert apart(PAIR, answer.phases) == min(phases.prefill.rate, phases.decode.rate)
