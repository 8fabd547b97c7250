"""What the planner is made of: devices, memory, step times, and the search for a rate."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.planner.errors import HardwareError, NoPlanError, PlanError
from cluster.planner.goodput import highest_rate
from cluster.planner.hardware import GPUS, Devices, Hardware, parse_devices
from cluster.planner.kinds import ReckonedKinds
from cluster.planner.memory import RESERVED, footprint
from cluster.planner.plans import Objective, Plan, Pool, serve_config
from cluster.planner.roofline import Roofline
from engine.config import ModelConfig
from engine.errors import UnsupportedModelError
from engine.latency import StepShape
from router.pool_view import Role

SHAPES = Path(__file__).parents[3] / "bench" / "shapes"
LLAMA = ModelConfig.from_pretrained(SHAPES / "llama-3.1-8b")
H100 = GPUS["h100-80g"]


def test_devices_are_written_with_their_number_and_perhaps_a_price() -> None:
    found = parse_devices("a100-80g:16, h100-80g:8:2.5")
    assert [(one.gpu.name, one.count, one.gpu.price) for one in found] == [
        ("a100-80g", 16, None), ("h100-80g", 8, 2.5),
    ]  # fmt: skip
    assert Hardware(found).count == 24
    for text, said in (
        ("b100:8", "nothing is known of 'b100'; there are a100-40g"),
        ("a100-80g", "how many of a100-80g"),
        ("a100-80g:0", "how many of a100-80g"),
        ("a100-80g:8:cheap", "'cheap' is not a price"),
    ):
        with pytest.raises(HardwareError, match=said):
            parse_devices(text)


def test_memory_of_a_known_model() -> None:
    whole = footprint(LLAMA, 1, 1, 80e9)
    assert whole.weight_bytes == pytest.approx(16.06e9, rel=0.001)  # 8.03 billion parameters
    assert whole.kv_bytes == 2 * 32 * 8 * 128 * 2
    assert whole.kv_tokens == int((80e9 * (1 - RESERVED) - whole.weight_bytes) // whole.kv_bytes)
    assert footprint(LLAMA, 1, 1, 16e9).kv_tokens == 0


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]))
def test_more_devices_hold_more(tp: int, pp: int) -> None:
    one, many = footprint(LLAMA, 1, 1, 40e9), footprint(LLAMA, tp, pp, 40e9)
    assert many.kv_tokens >= one.kv_tokens
    assert many.weight_bytes * tp * pp >= 0.95 * one.weight_bytes
    assert many.kv_bytes == one.kv_bytes


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="num_attention_heads"):
        footprint(LLAMA, 5, 1, 80e9)


def test_a_roofline_is_bound_by_reads_or_by_arithmetic() -> None:
    alone = Roofline(LLAMA, H100, 1, 1, H100.link_bytes_per_s)
    reads_s = 15e9 / H100.bytes_per_s
    assert reads_s < alone.step_s(StepShape((), 1, 100)) < 2 * reads_s
    flops_s = 2 * 7.5e9 * 4096 / H100.flops
    assert flops_s < alone.step_s(StepShape(((4096, 0),))) < 3 * flops_s
    two = Roofline(LLAMA, H100, 2, 1, H100.link_bytes_per_s)
    for shape in (StepShape(((4096, 0),)), StepShape((), 64, 64 * 2000)):
        assert 0.5 * alone.step_s(shape) < two.step_s(shape) < alone.step_s(shape)
    stages = Roofline(LLAMA, H100, 1, 4, H100.link_bytes_per_s)
    # Parts follow each other through the stages: prompts gain, single tokens read every weight all the same.
    assert stages.step_s(StepShape(((4096, 0),))) < alone.step_s(StepShape(((4096, 0),)))
    assert stages.step_s(StepShape((), 1, 100)) > alone.step_s(StepShape((), 1, 100))


def test_the_latency_model_of_a_roofline_is_close_to_it() -> None:
    roofline = Roofline(LLAMA, H100, 2, 1, H100.link_bytes_per_s)
    latency = roofline.latency()
    for shape in (StepShape(((700, 0),)), StepShape(((1500, 300),)), StepShape((), 24, 24 * 900)):
        assert latency.step_s(shape) == pytest.approx(roofline.step_s(shape), rel=0.2)


def test_kinds_are_those_that_fit() -> None:
    small = Hardware([Devices(GPUS["a10g-24g"], 8)])
    kinds = ReckonedKinds(LLAMA, small).kinds(2000)
    assert {(kind.tp, kind.pp) for kind in kinds} >= {(1, 1), (2, 1), (8, 1), (2, 2)}
    assert all(kind.kv_tokens >= 2000 and kind.devices <= 8 and not kind.is_measured for kind in kinds)
    with pytest.raises(NoPlanError, match=r"fits on no plan: with a sequence of 500000 tokens it needs 8\d"):
        ReckonedKinds(LLAMA, Hardware([Devices(GPUS["a10g-24g"], 2)])).kinds(500_000)


@given(st.floats(0.05, 50), st.floats(0.5, 100))
@example(48.0, 7.5)
@example(28.04, 0.525)
def test_the_highest_rate_is_found(limit: float, start: float) -> None:
    """Attainment falls from 1 to 0 around `limit`, somewhat sooner for one seed than for the other."""

    def trial(rate: float, seed: int) -> tuple[int, int]:
        own = limit * (1.1 if seed else 0.9)
        return round(1000 * max(0.0, min(1.0, 1.4 - 0.5 * rate / own))), 1000

    found = highest_rate(trial, 0.9, start, (0, 1))
    assert found.least <= found.rate <= found.greatest
    if not found.is_none and max(found.points) > 1.2 * limit:
        assert found.rate == pytest.approx(limit, rel=0.06)
        # Rates are chosen by all seeds together, so those beside a single seed's may lie far apart.
        assert found.least == pytest.approx(0.9 * limit, rel=0.2)
        assert found.least < found.greatest


def test_what_no_rate_helps_is_found_out_soon() -> None:
    """A fifth of the requests is late even alone: to go on to rates of next to nothing would be in vain."""
    found = highest_rate(lambda rate, seed: (80, 100), 0.9, 4.0, (0,))
    assert found.is_none
    assert found.rate == 0.0
    assert min(found.points) >= 4.0 / 300


def test_a_rate_that_nobody_needs_is_not_looked_for() -> None:
    found = highest_rate(lambda rate, seed: (1, 1), 0.9, 1.0, (0,), most=3.0)
    assert found.rate == max(found.points) == 3.0
    assert highest_rate(lambda rate, seed: (0, 1), 0.9, 1.0, (0,)).is_none


def test_a_plan_knows_its_parts_and_what_it_costs() -> None:
    hardware = Hardware([Devices(H100, 16)])
    kinds = {(kind.tp, kind.pp): kind for kind in ReckonedKinds(LLAMA, hardware).kinds(1000)}
    plan = Plan((Pool(Role.PREFILL, kinds[2, 1], 4), Pool(Role.DECODE, kinds[1, 1], 6)))
    unit, times = plan.unit()
    assert times == 2
    assert [pool.replicas for pool in unit.pools] == [2, 3]
    assert plan.devices == 14
    assert plan.cost(Objective.WATT) == 14 * 700
    with pytest.raises(PlanError, match="the cost of h100-80g; give it as h100-80g:COUNT:PRICE"):
        plan.cost(Objective.COST)
    config = serve_config(plan, {"max_model_len": 4000}, {"ttft_s": 0.5, "tpot_s": 0.05})
    assert config["model"] == {"max_model_len": 4000}
    assert config["prefill"]["tensor_parallel"] == 2
    assert config["decode"]["replicas"] == 6
    assert config["mixed"] == {"replicas": 0}
    cluster = plan.cluster(1e9)
    assert len(cluster.workers) == 10
    assert cluster.devices == 14
