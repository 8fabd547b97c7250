"""Whole searches on small questions."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from cluster.planner.errors import NoPlanError
from cluster.planner.hardware import GPUS, Devices, Hardware
from cluster.planner.kinds import Kind
from cluster.planner.plans import Plan, Pool
from cluster.planner.question import Question
from cluster.planner.search import Answer, finalists, measure_phases, most_near, search
from cluster.simulator.distserve_profile import StepTimes
from cluster.workload.arrivals import Arrivals
from cluster.workload.datasets import load_dataset
from cluster.workload.drawing import WorkloadSpec
from cluster.workload.slo import Slo
from engine.latency import LatencyModel
from router.pool_view import Role

GPU = GPUS["a100-80g"]
SPEC = WorkloadSpec(load_dataset("synthetic:prompt=500,answer=40"), Arrivals.parse("poisson"), range(0))


def kind(tp: int, faster: float, *, kv_tokens: int = 60_000, gpu: str = "a100-80g") -> Kind:
    """A worker that is so many times as fast as one device."""
    latency = LatencyModel({"step": 0.02 / faster, "rows": 2e-4 / faster, "decode_context": 6e-7 / faster})
    line = (20 / faster, 0.2 / faster, 0.0)
    decode = (20 / faster, 6e-4 / faster, 0.2 / faster)
    times = StepTimes(line, decode, decode, 95, 1, kv_tokens)
    return Kind(GPUS[gpu], tp, 1, latency, kv_tokens, 100_000, is_measured=True, times=times)


def question(slo: Slo, count: int = 4, **more: object) -> Question:
    asked = Question(SPEC, slo, Hardware([Devices(GPU, count)]), count=40, seeds=(0,), settle_s=4.0)
    return replace(asked, **more)  # type: ignore[arg-type]


def asked(one: Question, kinds: Sequence[Kind]) -> Answer:
    with ThreadPoolExecutor(1) as executor:
        return search(one, kinds, executor, lambda done, said: None)


@pytest.mark.slow
def test_the_best_comes_first_and_no_plan_has_more_than_there_is() -> None:
    one = question(Slo.fixed(0.4, 0.05))
    answer = asked(one, [kind(1, 1.0), kind(2, 1.8)])
    values = [finalist.value for finalist in answer.finalists]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0
    for finalist in answer.finalists:
        assert finalist.plan.devices <= 4
        assert finalist.value == pytest.approx(finalist.rate / finalist.plan.devices)
    assert {finalist.plan.is_disaggregated for finalist in answer.finalists} == {True, False}


def test_by_distserves_rules_only_what_they_know_is_a_plan() -> None:
    one = question(Slo.fixed(0.4, 0.05), by_distserve=True)
    answer = asked(one, [kind(1, 1.0)])
    roles = {tuple(pool.role for pool in finalist.plan.pools) for finalist in answer.finalists}
    assert roles == {(Role.PREFILL, Role.DECODE), (Role.MIXED,)}


def test_replicas_match_what_each_phase_can_do() -> None:
    """Answers of one token: next to nobody has to write."""
    short = WorkloadSpec(load_dataset("synthetic:prompt=900,answer=2"), Arrivals.parse("poisson"), range(0))
    one = question(Slo.fixed(0.6, 0.05), 8, workload=short)
    phases = [measure_phases(one, kind(1, 1.0))]
    pairs = [plan for plan in finalists(one, phases, is_near=False) if plan.is_disaggregated]
    readers, writers = pairs[0].pools
    assert readers.replicas > 3 * writers.replicas


@pytest.mark.slow
def test_hardware_of_two_kinds_is_shared_out() -> None:
    hardware = Hardware([Devices(GPU, 2), Devices(GPUS["h100-80g"], 2)])
    one = replace(question(Slo.fixed(0.4, 0.05)), hardware=hardware)
    answer = asked(one, [kind(1, 1.0), kind(1, 2.5, gpu="h100-80g")])
    for finalist in answer.finalists:
        for devices in hardware.devices:
            held = sum(pool.devices for pool in finalist.plan.pools if pool.kind.gpu == devices.gpu)
            assert held <= devices.count
    used = {frozenset(pool.kind.gpu.name for pool in one.plan.pools) for one in answer.finalists}
    assert frozenset({"a100-80g", "h100-80g"}) in used


@pytest.mark.slow
def test_slow_links_pair_what_shares_a_node() -> None:
    hardware = Hardware([Devices(GPU, 4)], per_node=2, inter_bytes_per_s=1e8)
    one = replace(question(Slo.fixed(0.4, 0.05)), hardware=hardware)
    answer = asked(one, [kind(1, 1.0), kind(2, 1.8)])
    assert answer.is_near
    pairs = [finalist.plan for finalist in answer.finalists if finalist.plan.is_near]
    assert pairs
    for plan in pairs:
        assert sum(pool.kind.tp for pool in plan.pools) <= 2
        assert len({pool.replicas for pool in plan.pools}) == 1
        assert one.link_bytes_per_s(plan) == GPU.link_bytes_per_s
    assert one.link_bytes_per_s(replace(pairs[0], is_near=False)) == 1e8


@pytest.mark.parametrize(
    ("count", "per_node", "tp", "most"),
    [(16, 8, (4, 1), 2), (16, 8, (1, 1), 8), (12, 8, (3, 1), 3), (4, 8, (4, 4), 0), (16, 8, (4, 4), 2)],
)
def test_pairs_that_share_nodes_are_packed_node_by_node(
    count: int, per_node: int, tp: tuple[int, int], most: int
) -> None:
    hardware = Hardware([Devices(GPU, count)], per_node, 1e8)
    one = replace(question(Slo.fixed(0.4, 0.05)), hardware=hardware)
    reader, writer = (kind(each, 1.0) for each in tp)
    assert most_near(one, reader, writer) == most
    staged = (replace(each, pp=2) for each in (reader, writer))
    assert most_near(one, *staged) == most // 2


def test_devices_of_two_kinds_share_no_node() -> None:
    hardware = Hardware([Devices(GPU, 4), Devices(GPUS["h100-80g"], 4)], 8, 1e9)
    one = replace(question(Slo.fixed(0.4, 0.05)), hardware=hardware)
    reader, writer = kind(1, 2.5, gpu="h100-80g"), kind(1, 1.0)
    apart = Plan((Pool(Role.PREFILL, reader, 1), Pool(Role.DECODE, writer, 1)))
    assert one.link_bytes_per_s(apart) == 1e9
    alike = Plan((Pool(Role.PREFILL, writer, 1), Pool(Role.DECODE, writer, 1)))
    assert one.link_bytes_per_s(alike) == GPU.link_bytes_per_s


def test_trials_last_as_long_as_queues_take_to_show() -> None:
    def lasts_s(one: Question, rate: float) -> float:
        return max(arrival.arrival_s for arrival in one._arrivals(rate, 0))

    assert lasts_s(question(Slo.fixed(0.4, 0.05)), 20.0) < 12
    assert lasts_s(question(Slo.fixed(30.0, 0.05)), 10.0) > 250, "ten times the TTFT limit"
    answers = WorkloadSpec(load_dataset("synthetic:prompt=9,answer=400"), Arrivals.parse("poisson"), range(0))
    long = question(Slo.fixed(0.4, 0.05), workload=answers)
    assert lasts_s(long, 200.0) > 60, "four answers, however many requests these are"


def test_owned_devices_count_whether_they_are_used_or_not() -> None:
    one = question(Slo.fixed(0.4, 0.05), 3)
    pair = Plan((Pool(Role.PREFILL, kind(1, 1.0), 1), Pool(Role.DECODE, kind(1, 1.0), 1)))
    assert one.cost(pair) == 2
    assert replace(one, is_owned=True).cost(pair) == 3


def test_memory_and_transfer_count() -> None:
    """The same workers with little memory, and with slow links, serve less."""
    one = question(Slo.fixed(0.4, 0.05))
    plan = Plan((Pool(Role.PREFILL, kind(1, 1.0), 1), Pool(Role.DECODE, kind(1, 1.0), 1)))
    good, total = one.joint(plan, 4.0, 0)
    assert good > 0.95 * total
    tight = Plan((Pool(Role.PREFILL, kind(1, 1.0), 1), Pool(Role.DECODE, kind(1, 1.0, kv_tokens=1_200), 1)))
    assert one.joint(tight, 4.0, 0)[0] < good
    slow = replace(one, hardware=Hardware([Devices(GPU, 4)], per_node=1, inter_bytes_per_s=1e8))
    assert slow.joint(plan, 4.0, 0)[0] < good


def test_what_cannot_be_planned_is_said_with_what_would_do() -> None:
    with pytest.raises(
        NoPlanError,
        match=r"ttft is 0\.01 s, but a request of 500 tokens alone takes .* 10% of the prompts",
    ):
        asked(question(Slo.fixed(0.01, 0.05)), [kind(1, 1.0)])
    with pytest.raises(NoPlanError, match=r"tpot is 0\.001 s, but a request of 500 tokens alone takes 0\.02"):
        asked(question(Slo.fixed(1.0, 0.001)), [kind(1, 1.0)])
