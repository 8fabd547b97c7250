"""Who stands in for a role that is gone, and when he goes back."""

from __future__ import annotations

from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st
from prelay.v1 import worker_pb2

from cluster.cover import PATIENCE_S, Cover, Member, stand_in
from cluster.errors import WorkerError
from cluster.host_spec import HostSpec
from cluster.pool_changes import Become, can_serve, is_live, serves_without
from tests.cluster.test_reshape import World

P, D, M = worker_pb2.ROLE_PREFILL, worker_pb2.ROLE_DECODE, worker_pb2.ROLE_MIXED


def members(*workers: tuple[str, worker_pb2.Role, worker_pb2.Role]) -> dict[str, Member]:
    return {worker_id: Member(role, own) for worker_id, role, own in workers}


def test_a_decode_worker_stands_in_at_once_and_a_prefill_worker_after_a_moment() -> None:
    assert stand_in(members(("d0", D, D), ("d1", D, D)), 0.0) == [Become("d0", M), Become("d1", M)]
    assert stand_in(members(("p0", P, P)), PATIENCE_S / 2) == []
    assert stand_in(members(("p0", P, P)), PATIENCE_S) == [Become("p0", M)]
    assert stand_in(members(("p0", M, P)), 9.0) == [], "it does already"
    assert stand_in({}, 9.0) == []


def test_they_go_back_so_that_somebody_serves_all_along() -> None:
    assert stand_in(members(("p0", P, P), ("d0", M, D)), 0.0) == [Become("d0", D)]
    # While the reader goes back, the writer that has come serves alone.
    assert stand_in(members(("p0", M, P), ("d0", D, D)), 0.0) == [
        Become("d0", M), Become("p0", P), Become("d0", D)
    ]  # fmt: skip


@given(
    st.dictionaries(
        st.sampled_from("abcde"),
        st.tuples(st.sampled_from([P, D, M]), st.booleans()).map(
            lambda one: Member(M if one[1] else one[0], one[0])
        ),
    )
)
def test_whoever_can_be_made_to_serve_is_and_nobody_who_serves_is_disturbed(there: dict[str, Member]) -> None:
    could = can_serve(member.role for member in there.values())
    now = {worker_id: member.role for worker_id, member in there.items()}
    for step in stand_in(there, 60.0):
        if could:
            assert is_live(now[step.worker_id], step.role) or serves_without(now, step.worker_id)
        now[step.worker_id] = step.role
        could = can_serve(now.values())
    assert can_serve(now.values()) == bool(there)


async def test_a_deployment_is_watched() -> None:
    world = World("decode.replicas=2")
    said: list[str] = []
    world.event = said.append  # type: ignore[attr-defined]
    cover = Cover(cast(Any, world), world.reshape, cast(Any, world))
    await cover.look(0.0)
    assert world.log == []
    live, world.lives[0].live = world.lives[0].live, None
    await cover.look(0.2)
    assert world.log == [f"decode-0 is {M} from now on", f"decode-1 is {M} from now on"]
    assert said == [f"worker decode-{n} stands in: it is mixed from now on" for n in (0, 1)]
    world.lives[0].live = live
    await cover.look(5.0)
    assert world.log[2:] == [f"decode-0 is {D} from now on", f"decode-1 is {D} from now on"]
    await cover.look(5.2)
    assert len(world.log) == 4


async def test_a_way_back_that_fails_is_tried_again() -> None:
    world = World("prefill.replicas=1", "decode.replicas=1")
    world.event = lambda line: None  # type: ignore[attr-defined]
    cover = Cover(cast(Any, world), world.reshape, cast(Any, world))
    live, world.lives[0].live = world.lives[0].live, None
    await cover.look(0.2)
    assert world.reshape.standing_in == {"decode-0"}
    world.lives[0].live = live
    decode, changes = world.lives[1], world.lives[1].read_prompts

    async def fail(template: HostSpec) -> Any:
        raise WorkerError("it does not answer")

    decode.read_prompts = fail  # type: ignore[method-assign]
    await cover.look(5.0)
    assert world.reshape.standing_in == {"decode-0"}
    decode.read_prompts = changes  # type: ignore[method-assign]
    await cover.look(5.2)
    assert decode.role == D
    assert not world.reshape.standing_in


async def test_whom_an_operator_has_given_another_role_stands_in_no_longer() -> None:
    world = World("decode.replicas=2")
    world.event = lambda line: None  # type: ignore[attr-defined]
    cover = Cover(cast(Any, world), world.reshape, cast(Any, world))
    live, world.lives[0].live = world.lives[0].live, None
    await cover.look(0.2)
    async for _ in world.reshape.set_role("decode-1", P, 0.0):
        pass
    world.lives[0].live = live
    await cover.look(5.0)
    assert [life.role for life in world.lives] == [P, D, P]
