"""Every policy, by name, on every mix of roles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.sequence import RequestKey
from router.pair_table import LinkState
from router.placement.base import Kind
from router.placement.room import can_read, can_write, has_blocks
from router.policies import POLICIES
from router.pool_view import Role, WorkerCapacity
from tests.router.pools import CAPACITY, CORE, Fixture, link, pool_of

SMALL = WorkerCapacity(block_size=16, num_blocks=8, max_num_seqs=8, max_batch_tokens=512)


def test_goodput_is_one_of_them_and_alone_tells_how_urgent_requests_are():
    told = {name for name in POLICIES if Fixture(name, pool_of(1, 1)).policy.tells_urgency}
    assert told == {"goodput"}
    assert all(Fixture(name, pool_of(1, 1)).policy.name == name for name in POLICIES)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    ("prefill", "decode", "mixed"), [(1, 1, 0), (1, 0, 1), (0, 0, 2), (2, 2, 2), (0, 2, 1), (2, 0, 2)]
)
@pytest.mark.parametrize("model", [CORE, None])
def test_an_idle_pool_takes_every_request_that_it_can_hold(name, prefill, decode, mixed, model, make_request):
    fixture = Fixture(name, pool_of(prefill, decode, mixed, model=model))
    for prompt_tokens in (1, 100, 3000):  # the last one is late before it is read
        request = make_request(prompt_tokens=prompt_tokens, max_tokens=100)
        assert fixture.policy.placement.choose(request, (), now=0.0) is not None


@pytest.mark.parametrize("name", POLICIES)
def test_what_fits_no_pair_is_read_where_it_is_written(name, make_request):
    request = make_request(prompt_tokens=200)
    pool = pool_of(0, 1, 1)
    small = pool_of(1, 0, 0, capacity=SMALL)["p0"]
    pool.add(small)
    link(pool, "p0", "d0")
    link(pool, "p0", "m0")
    decision = Fixture(name, pool).policy.placement.choose(request, (), now=0.0)
    assert (decision.kind, decision.prefill, decision.decode) == (Kind.LOCAL, None, "m0")


@pytest.mark.parametrize("name", POLICIES)
def test_a_pair_with_a_suspected_worker_is_none(name, make_request):
    pool = pool_of(1, 1)
    for worker in pool_of(mixed=1):
        pool.add(worker)
    fixture = Fixture(name, pool)
    if name not in ("goodput", "colocated"):  # these two may have other reasons to read it there
        assert fixture.policy.placement.choose(make_request(), (), now=0.0).prefill == "p0"
    pool["d0"].suspected = True
    assert fixture.policy.placement.choose(make_request(), (), now=0.0).decode == "m0"


@pytest.mark.parametrize("name", POLICIES)
def test_a_worker_that_has_failed_the_request_is_the_last_choice(name, make_request):
    pairs = Fixture(name, pool_of(2, 2)).policy.placement
    decision = pairs.choose(make_request(), {"p0", "d1"}, now=0.0)
    assert (decision.prefill, decision.decode) == ("p1", "d0")
    assert pairs.choose(make_request(), {"p0", "p1", "d0", "d1"}, now=0.0) is not None
    local = Fixture(name, pool_of(mixed=2)).policy.placement
    assert local.choose(make_request(), {"m1"}, now=0.0).decode == "m0"
    assert local.choose(make_request(), {"m0", "m1"}, now=0.0) is not None


@st.composite
def pools(draw):
    """Of up to three workers of each role, some suspected, full or unlinked, of known speed or not."""
    model = draw(st.sampled_from([CORE, None]))
    capacity = draw(st.sampled_from([CAPACITY, SMALL]))
    counts = [draw(st.integers(0, 3)) for _ in Role]
    pool = pool_of(*counts, capacity=capacity, model=model)
    for worker in pool:
        worker.suspected = draw(st.sampled_from([False, False, False, True]))
        if draw(st.sampled_from([False, False, False, True])):
            worker.refuse()
        for number in range(draw(st.integers(0, 4))):
            key = RequestKey(f"{worker.worker_id}-{number}", 1)
            reads = worker.role is Role.PREFILL or draw(st.booleans())
            worker.credit(key, draw(st.integers(1, 900)) if reads else 0, draw(st.integers(0, 6)))
    for reader in pool.up(Role.PREFILL):
        for writer in pool.up(Role.DECODE, Role.MIXED):
            state = draw(st.sampled_from([LinkState.LINKED, LinkState.LINKED, LinkState.UNREACHABLE]))
            link(pool, reader.worker_id, writer.worker_id, state)
    return pool


@pytest.mark.parametrize("name", POLICIES)
@given(data=st.data())
def test_a_decision_is_one_that_the_workers_accept(name, data, make_request):
    pool = data.draw(pools())
    request = make_request(
        prompt_tokens=data.draw(st.integers(1, 150)), arrived_at=data.draw(st.sampled_from([0.0, -5.0]))
    )
    avoid = data.draw(st.sets(st.sampled_from(["p0", "d0", "m0"])))
    decision = Fixture(name, pool).policy.placement.choose(request, avoid, now=0.0)
    if decision is None:
        return
    writer = pool[decision.decode]
    assert writer.role.writes
    assert not writer.suspected
    assert can_write(writer, request)
    assert has_blocks(writer, request)
    if decision.prefill is None:
        assert writer.role is Role.MIXED
        assert decision.kind is not Kind.DISAGGREGATED
    else:
        reader = pool[decision.prefill]
        assert reader.role is Role.PREFILL
        assert not reader.suspected
        assert not reader.refused
        assert can_read(reader, request)
        assert decision.decode in pool.pairs.linked_with(decision.prefill)
        assert decision.kind is Kind.DISAGGREGATED
