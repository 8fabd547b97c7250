"""Simulated clusters: nothing is lost, closed forms hold, and runs of steps are as good as steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.simulator.cluster_spec import Fault, NetworkSpec
from cluster.simulator.errors import SimulationError
from cluster.simulator.run import simulate
from cluster.workload.datasets import Shape
from cluster.workload.drawing import Arrival
from cluster.workload.jobs import Status
from cluster.workload.slo import Slo
from engine.latency import LatencyModel
from router.policies import POLICIES
from tests.cluster.simulator.clusters import CORE, COSTLY, arrivals, pools

LOOSE = Slo.fixed(60.0, 1.0)
TIGHT = Slo.fixed(1.1, 0.018)

requests_st = st.lists(
    st.tuples(st.floats(0, 12).map(lambda at: round(at, 4)), st.integers(1, 900), st.integers(1, 80)),
    min_size=1,
    max_size=30,
).map(sorted)
shapes_st = st.sampled_from([(1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 0, 1), (0, 0, 2), (1, 1, 1)])


def test_one_request_alone_takes_its_steps_and_its_messages() -> None:
    network = NetworkSpec(message_s=0.001, bytes_per_s=1e9, part_s=0.0)
    outcome = simulate(pools(1, 1, network=network), arrivals((2.0, 100, 4)), LOOSE)
    [row] = outcome.rows
    # Reserve, Reserved, Prefill, first token.
    assert row.first_s == pytest.approx(CORE.prefill_s(100) + 4 * 0.001)
    travels_s = max(0.001, 100 * 23_040 / 1e9)  # all of it after the step: it is a small one
    decode_s = sum(CORE.decode_s(1, 100 + step) for step in (1, 2, 3))
    assert row.last_s == pytest.approx((row.first_s or 0) + travels_s + decode_s)
    assert row.status is Status.COMPLETE
    assert row.output_tokens == 4
    assert outcome.placements == {"disaggregated": 1}
    assert sum(row.stages.values()) == pytest.approx(row.last_s)


def test_a_large_prompt_travels_while_it_is_read() -> None:
    slow = NetworkSpec(message_s=0.001, bytes_per_s=500 * 23_040 / CORE.prefill_s(500), part_s=0.0)
    [row] = simulate(pools(1, 1, network=slow), arrivals((0.0, 500, 2)), LOOSE).rows
    # Sending takes as long as reading; of four groups of layers only the last is sent afterwards.
    assert row.stages["transfer"] == pytest.approx(CORE.prefill_s(500) / 4)


def test_parts_that_share_a_link_wait_for_each_other() -> None:
    slow = NetworkSpec(message_s=0.001, bytes_per_s=200 * 23_040 / 0.5, part_s=0.0)
    rows = simulate(pools(2, 1, network=slow), arrivals((0.0, 100, 2), (0.0, 100, 2)), LOOSE).rows
    assert sorted(row.stages["transfer"] for row in rows) == pytest.approx([0.25, 0.5], abs=1e-3)


def test_prefill_alone_is_an_m_d_1_queue() -> None:
    """TTFT = D + R D^2 / (2 (1 - R D)) (DistServe, equation 1), where a step holds one prompt."""
    rate = 0.7 / CORE.prefill_s(512)
    at = np.cumsum(np.random.default_rng(1).exponential(1 / rate, 4000))
    cluster = pools(1, 1, policy="least_loaded")
    rows = simulate(cluster, [Arrival(float(one), Shape(512, 1)) for one in at], LOOSE).rows
    each_s = CORE.prefill_s(512)
    expected_s = each_s + rate * each_s**2 / (2 * (1 - rate * each_s))
    found_s = np.mean([row.first_s for row in rows]) - 4 * cluster.network.message_s
    assert found_s == pytest.approx(expected_s, rel=0.1)


def test_decode_alone_follows_the_batch_formula() -> None:
    """All are there before the first ends: from the last one's joining on, each step holds all."""
    num, output = 12, 400
    rows = simulate(pools(1, 1), arrivals(*[(0.0, 16, output)] * num), LOOSE).rows
    last = max(rows, key=lambda row: row.first_s or 0)
    steps = [CORE.decode_s(num, num * (16 + output // 2))] * output  # in the middle of it
    assert last.tpot_s == pytest.approx(np.mean(steps), rel=0.03)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_serves_everybody_in_time_when_there_is_time(policy: str) -> None:
    sizes = {"mixed": 2} if policy == "colocated" else {"prefill": 2, "decode": 2}
    requests = arrivals(*[(number * 1.0, 200, 20) for number in range(20)])
    rows = simulate(pools(**sizes, policy=policy), requests, Slo.fixed(2.0, 0.1)).rows
    assert {row.status for row in rows} == {Status.COMPLETE}
    assert max(row.first_s or 9 for row in rows) < 1


@settings(max_examples=20, deadline=None)
@given(
    requests_st,
    shapes_st,
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from([32_768, 2_000]),
    st.sampled_from([64, 2]),
    st.booleans(),
    st.sampled_from([CORE, COSTLY]),
)
def test_runs_of_steps_change_nothing(
    requests: list[tuple[float, int, int]],
    shape: tuple[int, int, int],
    policy: str,
    kv_tokens: int,
    max_num_seqs: int,
    tight: bool,
    latency: LatencyModel,
) -> None:
    cluster = pools(*shape, policy=policy, kv_tokens=kv_tokens, max_num_seqs=max_num_seqs, latency=latency)
    slo = TIGHT if tight else LOOSE
    runs = simulate(cluster, arrivals(*requests), slo)
    steps = simulate(cluster, arrivals(*requests), slo, max_run=1)
    assert runs == steps


@settings(max_examples=20, deadline=None)
@given(requests_st, st.floats(0.5, 10), st.floats(0.1, 5), st.sampled_from(["prefill-0", "decode-1"]))
def test_a_worker_that_dies_costs_time_and_nothing_else(
    requests: list[tuple[float, int, int]], at_s: float, down_s: float, worker_id: str
) -> None:
    cluster = pools(1, 1, policy="least_loaded", faults=[Fault(worker_id, at_s, down_s)])
    rows = simulate(cluster, arrivals(*requests), LOOSE).rows
    for row, (_, _, output) in zip(rows, requests, strict=True):
        # While nobody can read, or nobody can write, who comes is told so; who was let in is served.
        while_down = at_s <= row.arrival_s <= at_s + down_s
        assert row.status is Status.COMPLETE or (row.status is Status.REJECTED and while_down)
        assert row.output_tokens == (output if row.status is Status.COMPLETE else 0)
    assert simulate(cluster, arrivals(*requests), LOOSE, max_run=1).rows == rows


def test_blocks_that_are_not_there_are_waited_for() -> None:
    """Room for about two of the answers: others wait, or are preempted, and all end."""
    cluster = pools(1, 1, policy="least_loaded", kv_tokens=1600)
    outcome = simulate(cluster, arrivals(*[(0.0, 300, 400)] * 8), LOOSE)
    assert {row.status for row in outcome.rows} == {Status.COMPLETE}
    assert outcome.preemptions > 0


def test_prefixes_are_read_once() -> None:
    ids = tuple(range(10))
    shapes = [Shape(640, 4, ids, 64.0), Shape(700, 4, (*ids, 99), 64.0)]
    rows = simulate(pools(1, 1), [Arrival(at * 5.0, shape) for at, shape in enumerate(shapes)], LOOSE).rows
    assert (rows[1].first_s or 9) < 0.3 * (rows[0].first_s or 0)
    unshared = [Shape(640, 4, ids, 64.0), Shape(700, 4, tuple(range(20, 31)), 64.0)]
    rows = simulate(pools(1, 1), [Arrival(at * 5.0, shape) for at, shape in enumerate(unshared)], LOOSE).rows
    assert (rows[1].first_s or 0) > (rows[0].first_s or 9)


def test_the_router_knows_who_has_a_prefix() -> None:
    """Of two readers and writers the second request goes to those that have read its beginning."""
    ids = tuple(range(10))
    shapes = [Shape(640, 4, ids, 64.0), Shape(700, 4, (*ids, 99), 64.0)]
    rows = simulate(pools(4, 4), [Arrival(at * 5.0, shape) for at, shape in enumerate(shapes)], LOOSE).rows
    assert (rows[1].first_s or 9) < 0.3 * (rows[0].first_s or 0)


@pytest.mark.parametrize("late_s", [0.0, 0.004, 0.008, 0.0125, 0.0255])
def test_a_client_gives_up_while_its_last_token_is_on_its_way(late_s: float) -> None:
    [whole] = simulate(pools(1, 1), arrivals((0.0, 100, 3)), LOOSE).rows
    cluster = replace(pools(1, 1), timeout_s=(whole.last_s or 0.0) - late_s)
    rows = simulate(cluster, arrivals((0.0, 100, 3), (5.0, 8, 1)), LOOSE).rows
    assert rows[0].status in (Status.COMPLETE, Status.TIMED_OUT)
    assert rows[1].status is Status.COMPLETE


def test_a_client_gives_up() -> None:
    cluster = replace(pools(1, 1, policy="least_loaded"), timeout_s=1.0)
    rows = simulate(cluster, arrivals((0.0, 100, 2), (0.0, 100, 500), (3.0, 100, 2)), LOOSE).rows
    assert [row.status for row in rows] == [Status.COMPLETE, Status.TIMED_OUT, Status.COMPLETE]


def test_the_same_seed_gives_the_same_and_noise_another() -> None:
    requests = arrivals(*[(number * 0.5, 300, 30) for number in range(20)])
    first = simulate(pools(1, 1, noise=0.1), requests, TIGHT)
    assert simulate(pools(1, 1, noise=0.1), requests, TIGHT) == first
    assert simulate(pools(1, 1), requests, TIGHT) != first


def test_what_cannot_be_simulated_is_said() -> None:
    with pytest.raises(SimulationError, match="there must be a prefill and a decode worker, or a mixed one"):
        simulate(pools(1, 0), arrivals((0, 1, 1)), LOOSE)
    with pytest.raises(SimulationError, match="policy 'best': there are"):
        simulate(pools(1, 1, policy="best"), arrivals((0, 1, 1)), LOOSE)
    with pytest.raises(
        SimulationError, match="512 tokens a step are less than one for each of 600 sequences"
    ):
        simulate(pools(1, 1, max_num_seqs=600), arrivals((0, 1, 1)), LOOSE)
    with pytest.raises(SimulationError, match="must be finite numbers"):
        simulate(pools(1, 1, noise=float("nan")), arrivals((0, 1, 1)), LOOSE)
    with pytest.raises(SimulationError, match="a fault of nobody"):
        simulate(pools(1, 1, faults=[Fault("nobody", 1, 1)]), arrivals((0, 1, 1)), LOOSE)
