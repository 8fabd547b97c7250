"""When roles are changed: decisions by themselves, forecasts by the simulator, and a look at a router."""

from __future__ import annotations

import json
from concurrent.futures import Future
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prelay.v1 import admin_pb2, worker_pb2

from cluster.errors import ConfigError, WorkerError
from cluster.planner.live import Live
from cluster.role_controller import RoleController, question_of, shape_of, size_decider
from cluster.role_decider import RoleDecider, Shape, SizeDecider, Verdict
from cluster.role_forecast import forecast, foresee
from cluster.simulator.errors import SimulationError
from tests.cluster.test_reshape import World, configured

PAIR, TWO_MIXED = Shape(1, 1, 0), Shape(0, 0, 2)
LATENCY = {"step": 0.01, "rows": 4e-4, "decode_context": 1e-6}


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4))
def test_neighbours_are_one_change_away_and_can_serve(prefill: int, decode: int, mixed: int) -> None:
    shape = Shape(prefill, decode, mixed)
    for other in shape.neighbours():
        moved = [getattr(other, name) - getattr(shape, name) for name in ("prefill", "decode", "mixed")]
        assert sorted(moved) == [-1, 0, 1]
        assert min(other.prefill, other.decode, other.mixed) >= 0
        assert other.can_serve
    assert len(set(shape.neighbours())) == len(shape.neighbours())


def test_a_pair_can_become_a_prefill_and_a_mixed_worker() -> None:
    assert PAIR.neighbours() == [Shape(1, 0, 1)]
    assert set(TWO_MIXED.neighbours()) == {Shape(1, 0, 1)}


def test_a_gain_has_to_last_and_then_there_is_a_pause() -> None:
    decider, better = RoleDecider(delta=0.05, patience=3, cool_down_s=60.0), Shape(1, 0, 1)
    found = [decider.look(now, PAIR, {PAIR: 0.7, better: 0.9}) for now in (0.0, 10.0, 20.0)]
    assert [one.verdict for one in found] == [Verdict.WAIT, Verdict.WAIT, Verdict.CHANGE]
    assert (found[-1].best, round(found[-1].gain, 3)) == (better, 0.2)
    back = [decider.look(now, better, {PAIR: 0.9, better: 0.7}) for now in (30.0, 40.0, 50.0, 80.0)]
    assert [one.verdict for one in back] == [Verdict.WAIT] * 3 + [Verdict.CHANGE]
    assert "of the pause are left" in back[2].why


@pytest.mark.parametrize("shares", [(0.9, 0.94), (0.9, 0.5), (1.0, 1.0)])
def test_what_does_not_gain_enough_changes_nothing(shares: tuple[float, float]) -> None:
    decider, other = RoleDecider(), Shape(1, 0, 1)
    for now in range(10):
        assert (
            decider.look(10.0 * now, PAIR, dict(zip((PAIR, other), shares, strict=True))).verdict
            is Verdict.STAY
        )


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), max_size=60))
def test_changes_are_never_closer_than_the_pause_and_always_gain(
    forecasts: list[tuple[float, float, float]],
) -> None:
    decider, present, changed = RoleDecider(0.05, 3, 60.0), Shape(1, 0, 1), [-1e9]
    for tick, shares in enumerate(forecasts):
        shapes = [present, *present.neighbours()][: len(shares)]
        decision = decider.look(10.0 * tick, present, dict(zip(shapes, shares, strict=False)))
        if decision.verdict is Verdict.CHANGE:
            assert decision.gain > 0.05
            assert 10.0 * tick - changed[-1] >= 60.0
            changed.append(10.0 * tick)
            present = decision.best


def test_a_worker_more_where_the_target_is_not_kept_and_one_less_where_it_is_kept_without() -> None:
    decider = SizeDecider(2, 3, target=0.9, delta=0.05, patience=3, rest=5, cool_down_s=60.0)
    grown, three = PAIR.resized(+1), Shape(2, 1, 0)
    assert set(grown) == {three, Shape(1, 2, 0), Shape(1, 1, 1)}
    assert decider.candidates(PAIR, 0.6) == grown
    assert decider.candidates(PAIR, 0.92) == [], "neither short of the target nor far beyond it"
    found = [decider.look(now, PAIR, {PAIR: 0.6, three: 0.95}) for now in (0.0, 10.0, 20.0)]
    assert [one.verdict for one in found] == [Verdict.WAIT, Verdict.WAIT, Verdict.CHANGE]
    assert found[-1].best == three
    assert decider.candidates(three, 0.5) == [], "there are no more to be had"
    assert set(decider.candidates(three, 0.99)) == {PAIR}, "two that read and nobody who writes cannot serve"
    less = [decider.look(now, three, {three: 0.99, PAIR: 0.96}) for now in range(30, 100, 10)]
    assert [one.verdict for one in less] == [Verdict.WAIT] * 5 + [Verdict.CHANGE, Verdict.WAIT]
    assert decider.candidates(PAIR, 1.0) == [], "there are to be two"


@pytest.mark.parametrize("shares", [(0.8, 0.84), (0.8, 0.5), (0.96, 0.94)])
def test_as_many_workers_as_before(shares: tuple[float, float]) -> None:
    decider, present = SizeDecider(1, 4), Shape(2, 1, 0)
    for now in range(60):
        others = decider.candidates(present, shares[0])
        forecasts = {present: shares[0], **dict.fromkeys(others, shares[1])}
        assert decider.look(10.0 * now, present, forecasts).verdict is Verdict.STAY


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=100))
def test_there_are_never_more_or_fewer_than_there_may_be(shares: list[tuple[float, float]]) -> None:
    decider, present, changed = SizeDecider(2, 4, rest=4, cool_down_s=50.0), Shape(1, 1, 1), -1e9
    for tick, (share, other) in enumerate(shares):
        others = decider.candidates(present, share)
        decision = decider.look(10.0 * tick, present, {present: share, **dict.fromkeys(others, other)})
        if decision.verdict is Verdict.CHANGE:
            assert abs(decision.best.size - present.size) == 1
            assert 10.0 * tick - changed >= 50.0
            changed, present = 10.0 * tick, decision.best
            assert 2 <= present.size <= 4
            assert present.can_serve


def status_of(*roles: worker_pb2.Role) -> admin_pb2.GetStatusResponse:
    workers = [
        admin_pb2.WorkerStatus(
            up=True,
            info=worker_pb2.WorkerInfo(
                worker_id=f"w{number}", role=role, latency=LATENCY, num_devices=1, num_blocks=2000,
                block_size=16, kv_token_bytes=1000, max_batch_tokens=512, max_num_seqs=64, tensor_parallel=1,
                pipeline_parallel=1,
            ),
        )
        for number, role in enumerate(roles)
    ]  # fmt: skip
    limits = admin_pb2.ClassOutcomes(ttft_limit_s=1.0, tpot_limit_s=0.02, outcomes={"good": 100})
    return admin_pb2.GetStatusResponse(workers=workers, classes={"busy": limits})


def workload_of(prompt: int, answer: int, rate: float, count: int = 200) -> admin_pb2.GetWorkloadResponse:
    shapes = [admin_pb2.RequestShape(prompt_tokens=prompt, answer_tokens=answer)] * count
    return admin_pb2.GetWorkloadResponse(
        seconds=60, rate=rate, shapes=shapes, latest_rate=rate, num_latest=count
    )


P, D, M = worker_pb2.ROLE_PREFILL, worker_pb2.ROLE_DECODE, worker_pb2.ROLE_MIXED


def test_the_simulator_knows_which_role_is_missing() -> None:
    """Long prompts and short answers: three that read and one that writes are better than the other way."""
    live = Live.of("the router", status_of(P, D, D, D), workload_of(1000, 8, 4.0))
    assert shape_of(live) == Shape(1, 3, 0)
    found = forecast(question_of(live), live.kinds(), [Shape(1, 3, 0), Shape(3, 1, 0)], 4.0)
    assert found[1] > found[0] + 0.2


@pytest.mark.parametrize(("roles", "looks_further"), [((P, P, P, D), False), ((P, D, D, D), True)])
def test_others_are_simulated_only_if_they_can_gain_enough(
    roles: tuple[worker_pb2.Role, ...], looks_further: bool
) -> None:
    live = Live.of("the router", status_of(*roles), workload_of(1000, 8, 4.0))
    present, asked, kinds, delta = shape_of(live), question_of(live), live.kinds(), 0.05
    found = foresee(asked, kinds, present, 4.0, delta)
    [share] = forecast(asked, kinds, [present], 4.0)
    assert found[present] == share
    assert (share < 1 - delta) == looks_further
    assert set(found) >= {present, *(present.neighbours() if looks_further else ())}
    assert (len(found) > 1) == looks_further
    # Those that are left out would have changed nothing.
    others = dict(zip(present.neighbours(), forecast(asked, kinds, present.neighbours(), 4.0), strict=True))
    decided = [RoleDecider(delta).look(0.0, present, some) for some in (found, {present: share, **others})]
    assert decided[0].verdict is decided[1].verdict
    assert max(found.values()) >= max(share, *others.values()) or not looks_further


class Router:
    def __init__(self, status: Any, workload: Any) -> None:
        self._status, self._workload = status, workload

    async def status(self) -> Any:
        if isinstance(self._status, Exception):
            raise self._status
        return self._status

    async def workload(self) -> Any:
        return self._workload


class Here:
    """Instead of a pool of processes."""

    def submit(self, function: Any, *arguments: Any) -> Any:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


@pytest.mark.parametrize("acts", [False, True])
async def test_a_role_is_changed_after_three_looks(acts: bool) -> None:
    world = World("prefill.replicas=1", "decode.replicas=3")
    said: list[str] = []
    world.event = said.append  # type: ignore[attr-defined]
    router = Router(status_of(P, D, D, D), workload_of(1000, 8, 4.0))
    controller = RoleController(cast(Any, router), world.reshape, cast(Any, world), acts=acts)
    for _ in range(3):
        await controller._look(cast(Any, Here()))
    numbers = json.loads(said[2].removeprefix("controller: "))
    assert (numbers["verdict"], numbers["present"]) == ("change", "1 prefill + 3 decode + 0 mixed")
    assert numbers["gain"] > 0.05
    assert numbers["forecasts"][numbers["best"]] == pytest.approx(
        numbers["forecasts"][numbers["present"]] + numbers["gain"], abs=0.002
    )
    assert (world.log != []) == acts
    if acts:
        roles = [life.role for life in world.lives]
        wanted = numbers["best"]
        assert wanted == f"{roles.count(P)} prefill + {roles.count(D)} decode + {roles.count(M)} mixed"


@pytest.mark.parametrize("is_free", [False, True])
async def test_a_worker_is_added_where_there_is_room(is_free: bool) -> None:
    world = World("prefill.replicas=1", "decode.replicas=1")
    world.is_free = is_free
    said: list[str] = []
    world.event = said.append  # type: ignore[attr-defined]
    router = Router(status_of(P, D), workload_of(1000, 8, 3.0))
    sizes = SizeDecider(2, 3, patience=1)
    controller = RoleController(cast(Any, router), world.reshape, cast(Any, world), acts=True, sizes=sizes)
    controller._decider = RoleDecider(delta=1.0)  # of roles nothing is expected
    await controller._look(cast(Any, Here()))
    numbers = json.loads(said[0].removeprefix("controller: "))
    assert (numbers["verdict"], numbers["present"]) == ("change", "1 prefill + 1 decode + 0 mixed")
    assert set(numbers["forecasts"]) == {str(shape) for shape in (PAIR, *PAIR.resized(+1))}
    assert len(world.lives) == (3 if is_free else 2)
    assert any("Ray has no room for another" in line for line in said) == (not is_free)


def test_sizes_are_the_configurations() -> None:
    assert size_decider(configured("controller.mode=act")) is None
    sizes = size_decider(configured("controller.mode=act", "controller.max_workers=3"))
    assert sizes is not None
    assert sizes.candidates(PAIR, 0.5)
    assert not sizes.candidates(PAIR, 1.0)


@pytest.mark.parametrize(
    ("assignments", "complaint"),
    [
        (["controller.max_workers=3"], "controller.mode is none, so nobody looks at it"),
        (["controller.mode=act", "controller.max_workers=1"], "max_workers is 1, but there are 2 workers"),
        (["controller.mode=act", "controller.min_workers=3"], "min_workers is 3, but there are 2 workers"),
        (["controller.mode=act", "controller.target=1"], r"controller\.target"),
    ],
)
def test_bounds_that_do_not_hold_are_refused(assignments: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        configured(*assignments)


async def test_what_cannot_be_simulated_is_said() -> None:
    world = World()
    said: list[str] = []
    world.event = said.append  # type: ignore[attr-defined]

    class Fails:
        def submit(self, function: Any, *arguments: Any) -> Any:
            future: Future[Any] = Future()
            future.set_exception(SimulationError("too long"))
            return future

    router = Router(status_of(P, D), workload_of(1000, 8, 4.0))
    controller = RoleController(cast(Any, router), world.reshape, cast(Any, world), acts=True)
    await controller._look(cast(Any, Fails()))
    assert said == ["controller: what came cannot be simulated: too long"]
    assert world.log == []


@pytest.mark.parametrize(
    "router",
    [
        Router(WorkerError("gone"), None),
        Router(status_of(P, D), workload_of(1000, 8, 4.0, count=3)),
        Router(status_of(P, D), workload_of(1000, 8, 0.0)),
        Router(admin_pb2.GetStatusResponse(), workload_of(1000, 8, 4.0)),
    ],
)
async def test_where_nothing_can_be_said_nothing_is(router: Router) -> None:
    world = World()
    said: list[str] = []
    world.event = said.append  # type: ignore[attr-defined]
    await RoleController(cast(Any, router), world.reshape, cast(Any, world), acts=True)._look(
        cast(Any, Here())
    )
    assert said == world.log == []
