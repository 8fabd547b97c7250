"""Steps from the workers that there are to those that are wanted."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from prelay.v1 import worker_pb2

from cluster.errors import ConfigError
from cluster.pool_changes import (
    Become,
    Renew,
    Start,
    Stop,
    can_serve,
    is_live,
    renewals,
    said,
    serves_without,
    steps_to,
)
from cluster.roles import ROLE_NAMES

P, D, M = worker_pb2.ROLE_PREFILL, worker_pb2.ROLE_DECODE, worker_pb2.ROLE_MIXED

roles = st.lists(st.sampled_from([P, D, M]), min_size=1, max_size=7)
counts = st.fixed_dictionaries({role: st.integers(0, 4) for role in (P, D, M)})


def sensible(wanted: dict[worker_pb2.Role, int]) -> bool:
    """As a configuration may have it: decode workers get their prompts from prefill workers only."""
    return can_serve(role for role, count in wanted.items() if count) and not (wanted[D] and not wanted[P])


@given(roles, counts)
def test_requests_are_served_all_along(
    there: list[worker_pb2.Role], wanted: dict[worker_pb2.Role, int]
) -> None:
    assume(sensible(dict(Counter(there)) | {role: there.count(role) for role in (P, D, M)}))
    assume(sensible(wanted))
    now = {f"w{index}": role for index, role in enumerate(there)}
    for number, step in enumerate(steps_to(now, wanted)):
        match step:
            case Start(role):
                now[f"new {number}"] = role
            case Become(worker_id, role):
                assert is_live(now[worker_id], role) or serves_without(now, worker_id)
                now[worker_id] = role
            case Stop(worker_id):
                assert serves_without(now, worker_id)
                del now[worker_id]
        assert can_serve(now.values())
    assert Counter(now.values()) == Counter({role: count for role, count in wanted.items() if count})


@given(roles, counts)
def test_no_more_is_changed_than_has_to_be(
    there: list[worker_pb2.Role], wanted: dict[worker_pb2.Role, int]
) -> None:
    assume(sensible({role: there.count(role) for role in (P, D, M)}))
    assume(sensible(wanted))
    steps = steps_to({f"w{index}": role for index, role in enumerate(there)}, wanted)
    missing = sum(max(0, count - there.count(role)) for role, count in wanted.items())
    spare = sum(max(0, there.count(role) - count) for role, count in wanted.items())
    assert len(steps) == max(missing, spare)


@given(roles)
def test_requests_are_served_while_all_are_replaced(there: list[worker_pb2.Role]) -> None:
    assume(len(there) > 1)
    assume(sensible({role: there.count(role) for role in (P, D, M)}))
    before = {f"w{index}": role for index, role in enumerate(there)}
    now, renewed = dict(before), []
    for step in renewals(before, before):
        match step:
            case Become(worker_id, role):
                assert is_live(now[worker_id], role) or serves_without(now, worker_id)
                now[worker_id] = role
            case Renew(worker_id):
                assert serves_without(now, worker_id)
                renewed.append(worker_id)
        assert can_serve(now.values())
    assert now == before, "everybody has its own role again"
    assert renewed == list(before)


def test_who_can_be_spared_is_replaced_without_ado_and_for_others_somebody_stands_in() -> None:
    assert renewals({"p0": P, "d0": D, "d1": D}, ["d1", "d0"]) == [Renew("d1"), Renew("d0")]
    assert renewals({"p0": P, "d0": D}, ["p0"]) == [Become("d0", M), Renew("p0"), Become("d0", D)]
    steps = renewals({"p0": P, "d0": D}, ["d0"])
    assert [said(step, ROLE_NAMES) for step in steps] == [
        "make d0 a mixed worker", "make p0 a mixed worker", "make d0 a decode worker", "replace d0",
        "make d0 a mixed worker", "make p0 a prefill worker", "make d0 a decode worker",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="m0 is the only worker: start another one before"):
        renewals({"m0": M}, ["m0"])


def test_the_youngest_change_and_live_changes_come_when_they_free_somebody() -> None:
    steps = steps_to({"prefill-0": P, "decode-0": D}, {P: 0, D: 0, M: 2})
    assert steps == [Become("decode-0", M), Become("prefill-0", M)]
    assert said(steps[0], ROLE_NAMES) == "make decode-0 a mixed worker"
    assert steps_to({"mixed-0": M, "mixed-1": M}, {P: 1, D: 1, M: 0}) == [
        Become("mixed-1", P), Become("mixed-0", D)
    ]  # fmt: skip
    assert steps_to({"p0": P, "d0": D, "d1": D}, {D: 1}) == [Stop("d1")]
    assert steps_to({"p0": P, "d0": D}, {D: 3}) == [Start(D), Start(D)]


def test_what_could_not_serve_is_refused() -> None:
    with pytest.raises(ConfigError, match="by way of more mixed workers"):
        steps_to({"prefill-0": P, "decode-0": D}, {P: 0, D: 2})
