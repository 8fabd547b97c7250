"""What each baseline does that the others do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.prefix_digests import prefix_digests, short
from engine.sequence import RequestKey
from router.admission.base import Refusal
from router.errors import LateError, OverloadedError
from router.placement.base import Decision, Kind
from router.placement.power_of_two import PowerOfTwoPlacement
from router.slo import SloLimits
from tests.router.pools import CAPACITY, Fixture, pool_of

BATCH = CAPACITY.max_batch_tokens


def chosen(fixture, request, avoid=()):
    """(prefill, decode) of the decision."""
    decision = fixture.policy.placement.choose(request, avoid, now=0.0)
    return None if decision is None else (decision.prefill, decision.decode)


def load(fixture, worker_id, tokens=0, blocks=1, name="other"):
    fixture.pool[worker_id].credit(RequestKey(f"{name}-{worker_id}", 1), tokens, blocks)


def test_round_robin_takes_turns_whatever_the_load(make_request):
    fixture = Fixture("round_robin", pool_of(2, 3))
    load(fixture, "p0", tokens=BATCH)
    load(fixture, "d0", blocks=3)
    turns = [chosen(fixture, make_request()) for _ in range(6)]
    assert [prefill for prefill, _ in turns] == ["p0", "p1"] * 3
    assert [decode for _, decode in turns] == ["d0", "d1", "d2"] * 2


def test_round_robin_passes_over_who_has_no_room(make_request):
    fixture = Fixture("round_robin", pool_of(3, 1))
    load(fixture, "p1", tokens=2 * BATCH)
    assert [chosen(fixture, make_request())[0] for _ in range(3)] == ["p0", "p2", "p0"]


def test_round_robin_over_mixed_workers(make_request):
    fixture = Fixture("round_robin", pool_of(mixed=2))
    assert [chosen(fixture, make_request())[1] for _ in range(3)] == ["m0", "m1", "m0"]


def test_a_turn_is_not_lost_while_nobody_has_room(make_request):
    fixture = Fixture("round_robin", pool_of(1, 2))
    fixture.pool["p0"].refuse()
    assert chosen(fixture, make_request()) is None
    assert fixture.policy.placement._last_writer == ""


def test_power_of_two_takes_the_one_of_two_with_less_context_to_come(make_request):
    fixture = Fixture("power_of_two", pool_of(1, 2))
    long, brief = make_request("long", prompt_tokens=900), make_request("brief", prompt_tokens=10)
    for request, worker_id in ((long, "d0"), (brief, "d1")):
        decision = Decision(Kind.DISAGGREGATED, "p0", worker_id)
        fixture.estimates.credit(RequestKey(request.request_id, 1), request, decision, now=0.0)
        fixture.pool[worker_id].emitted(RequestKey(request.request_id, 1), 1)
    assert {chosen(fixture, make_request())[1] for _ in range(20)} == {"d1"}


def test_power_of_two_looks_at_two_only(make_request):
    class Drawn:
        def sample(self, workers, count):
            assert count == 2
            return [one for one in workers if one.worker_id in ("d2", "d3")]

    fixture = Fixture("power_of_two", pool_of(1, 4))
    for number in range(2):
        load(fixture, "d2", name=f"r{number}")
    placement = PowerOfTwoPlacement(fixture.pool, fixture.estimates, Drawn())
    assert placement.choose(make_request(), (), now=0.0).decode in ("d2", "d3")


def test_reject_forward_tries_the_next_one_until_an_idle_one_accepts(make_request):
    fixture = Fixture("reject_forward", pool_of(3, 1))
    load(fixture, "p0", tokens=1)
    load(fixture, "p1", tokens=1)
    assert chosen(fixture, make_request()) == ("p2", "d0")
    load(fixture, "p2", tokens=1)
    assert chosen(fixture, make_request()) is None
    fixture.pool["p1"].release(RequestKey("other-p1", 1))
    assert chosen(fixture, make_request()) == ("p1", "d0")


def cache(fixture, worker_id, request):
    capacity = fixture.pool[worker_id].capacity
    digests = prefix_digests(capacity.fingerprint, "", capacity.block_size, request.prompt_token_ids)
    fixture.prefixes.stored(worker_id, map(short, digests))


def test_cache_aware_weighs_the_queue_against_the_cached_prefix(make_request):
    fixture = Fixture("cache_aware", pool_of(2, 1))
    request = make_request(prompt_tokens=800)
    cache(fixture, "p1", request)
    assert chosen(fixture, request) == ("p1", "d0")
    decision = Decision(Kind.DISAGGREGATED, "p1", "d0")
    for number, prefill in ((1, "p1"), (2, "p0")):  # 0.5 s each in its queue, 0.8 s to compute it elsewhere
        other = make_request(f"other{number}", arrived_at=-1.0)
        other = replace(other, prompt_token_ids=tuple(range(10_000 * number, 10_000 * number + 500)))
        fixture.estimates.credit(RequestKey(other.request_id, 1), other, decision, now=0.0)
        assert chosen(fixture, request) == (prefill, "d0")


def test_cache_aware_binds_at_once(make_request):
    fixture = Fixture("cache_aware", pool_of(1, 1))
    for number in range(4):
        request = make_request(f"r{number}", prompt_tokens=600)
        decision = fixture.policy.placement.choose(request, (), now=0.0)
        assert decision.expected.ttft_s == pytest.approx((number + 1) * 0.616, rel=0.05)
        fixture.estimates.credit(RequestKey(f"r{number}", 1), request, decision, now=0.0)


@pytest.mark.parametrize(("prefill", "decode", "mixed"), [(1, 1, 0), (0, 0, 1)])
def test_mooncake_rejects_early_who_would_be_late(prefill, decode, mixed, make_request):
    fixture = Fixture("cache_aware", pool_of(prefill, decode, mixed))
    admission = fixture.policy.admission

    def judged(prompt_tokens, limits):
        return admission.judge(
            make_request(prompt_tokens=prompt_tokens, limits=limits), 0.0, 0, overdue=False
        )

    assert not isinstance(judged(500, SloLimits(0.6, 0.1)), Refusal)
    late = judged(500, SloLimits(0.4, 0.1))
    assert isinstance(late.error, LateError)
    assert (late.reason, late.counts) == ("late", True)
    assert late.error.ttft_s == pytest.approx(0.51, rel=0.05)
    assert "predicted TTFT 0.5" in str(late.error)
    assert "limit 0.4 s" in str(late.error)
    assert isinstance(judged(500, SloLimits(0.6, 0.005)).error, LateError)
    assert admission.could_have_served(0.0) == 0


def test_mooncake_refuses_what_everybody_refuses_and_lets_in_what_it_knows_nothing_of(make_request):
    fixture = Fixture("cache_aware", pool_of(1, 1, model=None))
    admission = fixture.policy.admission
    hard = make_request(prompt_tokens=2000, limits=SloLimits(1e-3, 1e-3))
    assert admission.judge(hard, 0.0, 0, overdue=False) is hard
    full = admission.judge(hard, 0.0, ahead=100, overdue=False)
    assert isinstance(full.error, OverloadedError)
    assert full.reason == "gate_full"
    assert admission.misfit(make_request(max_tokens=9000)) is not None
    fixture.pool["d0"].refuse()
    assert admission.judge(hard, 0.0, 0, overdue=False) is hard  # it waits until a decode worker has room


def test_colocated_reads_where_fewest_prompt_tokens_wait_then_where_fewest_requests_are(make_request):
    fixture = Fixture("colocated", pool_of(1, 0, 3))
    load(fixture, "m0", tokens=20)
    load(fixture, "m1")
    assert chosen(fixture, make_request()) == (None, "m2")
    for name in ("a", "b"):
        load(fixture, "m2", name=name)
    assert chosen(fixture, make_request()) == (None, "m1")
    load(fixture, "m1", tokens=30, name="a")
    assert chosen(fixture, make_request()) == (None, "m2")
    load(fixture, "m2", tokens=30, name="c")
    assert chosen(fixture, make_request()) == (None, "m0")


def test_colocated_waits_rather_than_being_handed_over(make_request):
    fixture = Fixture("colocated", pool_of(1, 0, 1))
    load(fixture, "m0", tokens=2 * BATCH)
    assert chosen(fixture, make_request()) is None
    assert chosen(Fixture("colocated", pool_of(1, 1)), make_request()) == ("p0", "d0")
