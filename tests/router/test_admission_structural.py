"""Who is not let in under every policy: who has no worker, who fits nowhere, who is one too many."""

from __future__ import annotations

from router.admission.base import Refusal
from router.admission.structural import StructuralAdmission
from router.errors import NoPairError, NoWorkersError, OverloadedError, PromptTooLongError
from router.gate.fcfs import FcfsGateQueue
from router.pair_table import LinkState, Pair, PairLink
from router.pool_view import PoolView, Role, WorkerCapacity, WorkerView


def pool_of(prefill=2, decode=2, num_blocks=64):
    pool = PoolView()
    capacity = WorkerCapacity(16, num_blocks, 4, 100)
    for index in range(prefill):
        pool.add(WorkerView(f"p{index}", 1, Role.PREFILL, capacity))
    for index in range(decode):
        pool.add(WorkerView(f"d{index}", 1, Role.DECODE, capacity))
    return linked(pool)


def linked(pool):
    for one in pool.up(Role.PREFILL):
        for other in pool.up(Role.DECODE):
            pool.pairs.put(Pair(one.worker_id, other.worker_id), PairLink(LinkState.LINKED))
    return pool


def admission_of(pool, gate=None):
    return StructuralAdmission(pool, gate or FcfsGateQueue(), max_gated_requests=2, retry_after_s=3.0)


def judge(pool, request, gate=None, ahead=0, overdue=False):
    return admission_of(pool, gate).judge(request, 0.0, ahead, overdue=overdue)


def refused(pool, request, **how):
    verdict = judge(pool, request, **how)
    assert isinstance(verdict, Refusal)
    return verdict


def test_what_fits_is_let_in_as_it_is(make_request):
    request = make_request()
    assert judge(pool_of(), request) is request
    assert admission_of(pool_of()).could_have_served(0.0) == 0


def test_no_more_wait_than_may(make_request):
    gate, request = FcfsGateQueue(), make_request()
    gate.add(make_request("a"))
    assert judge(pool_of(), request, gate) is request
    for full in (refused(pool_of(), request, gate=gate, ahead=1), refused(pool_of(), request, ahead=2)):
        assert isinstance(full.error, OverloadedError)
        assert (full.reason, full.counts, full.error.retry_after_s) == ("gate_full", True, 3.0)


def test_without_a_role_nothing_is_let_in(make_request):
    alone = refused(pool_of(decode=0), make_request())
    assert isinstance(alone.error, NoWorkersError)
    assert "no decode worker" in str(alone.error)


def test_what_fits_nowhere_is_not_let_in(make_request):
    huge = refused(pool_of(num_blocks=8), make_request(prompt_tokens=65, max_tokens=64))
    assert isinstance(huge.error, PromptTooLongError)
    assert (huge.reason, huge.counts) == ("never_fits", False)
    assert "largest decode worker has 8: at most 128 tokens" in str(huge.error)
    pool = pool_of(decode=0, num_blocks=2)
    pool.add(WorkerView("d0", 1, Role.DECODE, WorkerCapacity(16, 64, 4, 100)))
    huge = refused(linked(pool), make_request(prompt_tokens=33, max_tokens=1))
    assert "largest prefill worker has 2: at most 32 tokens" in str(huge.error)


def test_what_is_said_of_one_whose_answer_has_begun(make_request):
    pool = PoolView()
    pool.add(WorkerView("p0", 1, Role.PREFILL, WorkerCapacity(16, 2, 0, 100)))
    pool.add(WorkerView("d0", 1, Role.DECODE, WorkerCapacity(16, 64, 4, 100)))
    request = make_request(prompt_tokens=16, max_tokens=100).going_on(range(17))
    message = str(admission_of(linked(pool)).misfit(request))
    assert "the 16 tokens of the prompt and the 17 of the answer so far need 3 KV blocks" in message
    assert admission_of(pool).misfit(make_request(prompt_tokens=16).going_on(range(16))) is None


def test_the_largest_worker_is_the_one_that_holds_most_tokens(make_request):
    """Not the one with the most blocks, which may be small."""
    pool = pool_of(decode=0)
    pool.add(WorkerView("d0", 1, Role.DECODE, WorkerCapacity(16, 8, 4, 100)))
    pool.add(WorkerView("d1", 1, Role.DECODE, WorkerCapacity(64, 4, 4, 100)))
    request = make_request(prompt_tokens=56, max_tokens=200)
    assert judge(linked(pool), request) is request


def test_who_is_the_largest_changes_with_the_pool(make_request):
    pool = pool_of(num_blocks=8)
    pool.add(WorkerView("large", 1, Role.DECODE, WorkerCapacity(16, 64, 4, 100)))
    admission, request = admission_of(linked(pool)), make_request(prompt_tokens=100, max_tokens=100)
    assert admission.misfit(request) is None
    pool.down("large")
    assert admission.misfit(request) is not None


def test_a_mixed_worker_can_hold_what_it_reads_and_writes_itself(make_request):
    pool = PoolView()
    pool.add(WorkerView("m0", 1, Role.MIXED, WorkerCapacity(16, 8, 4, 100)))
    fits, too_long = (make_request(prompt_tokens=100, max_tokens=answer) for answer in (28, 29))
    assert judge(pool, fits) is fits
    assert "largest mixed worker has 8: at most 128 tokens" in str(refused(pool, too_long).error)
    # One that could write the answer is of no use if nobody can send it there.
    pool.add(WorkerView("d0", 1, Role.DECODE, WorkerCapacity(16, 64, 4, 100)))
    assert refused(pool, too_long).error.param == "max_tokens"
    pool.add(WorkerView("p0", 1, Role.PREFILL, WorkerCapacity(16, 6, 0, 100)))
    error = refused(linked(pool), too_long).error
    assert (error.param, "largest prefill worker has 6" in str(error)) == ("prompt", True)
    assert judge(pool, fits) is fits
    pool.add(WorkerView("p1", 1, Role.PREFILL, WorkerCapacity(16, 7, 0, 100)))
    assert judge(linked(pool), too_long) is too_long


def test_links_that_may_come_are_waited_for(make_request):
    pool, request = pool_of(), make_request()
    for pair in (Pair(p, d) for p in ("p0", "p1") for d in ("d0", "d1")):
        pool.pairs.put(pair, PairLink(LinkState.MISMATCHED, "block_size is 16 here and 32 there"))
    refusal = refused(pool, request)
    assert isinstance(refusal.error, NoPairError)
    assert (refusal.reason, refusal.counts) == ("no_pair", True)
    assert "do not fit together: block_size is 16 here and 32 there" in str(refusal.error)
    pool.pairs.put(Pair("p1", "d1"), PairLink(LinkState.UNREACHABLE, "nobody listens"))
    assert judge(pool, request) is request
    overdue = refused(pool, request, overdue=True)
    assert "d1 and p1 are unreachable: nobody listens" in str(overdue.error)
    pool.pairs.put(Pair("p1", "d1"), PairLink(LinkState.LINKED))
    assert judge(pool, request, overdue=True) is request
