"""Who goes next, where to, and who is not let in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prelay.v1 import worker_pb2

from engine.sequence import RequestKey
from router.admission import Admission
from router.errors import (
    HandoffFailedError,
    InvalidRequestError,
    NoWorkersError,
    OverloadedError,
    PromptTooLongError,
    WorkerFailedError,
)
from router.failures import MAX_UNREACHABLE_PAIRS, Retry, judge_failure
from router.gate_queue import FcfsGateQueue
from router.placement.base import Pair
from router.placement.least_loaded import LeastLoadedPlacement
from router.pool_view import PoolView, Role, WorkerCapacity, WorkerView


def pool_of(prefill=2, decode=2, num_blocks=64, max_num_seqs=4, max_batch_tokens=100):
    pool = PoolView()
    capacity = WorkerCapacity(16, num_blocks, max_num_seqs, max_batch_tokens)
    for index in range(prefill):
        pool.add(WorkerView(f"p{index}", 1, Role.PREFILL, capacity))
    for index in range(decode):
        pool.add(WorkerView(f"d{index}", 1, Role.DECODE, capacity))
    return pool


def choose(pool, request, excluded=()):
    return LeastLoadedPlacement().choose(request, pool, excluded, now=0.0)


@given(
    operations=st.lists(
        st.tuples(st.booleans(), st.integers(0, 30), st.integers(0, 5)),
        max_size=120,
    )
)
def test_the_gate_is_a_queue_by_arrival(operations, make_request):
    gate, waiting = FcfsGateQueue(), {}
    for add, number, arrived_at in operations:
        request_id = f"r{number:02d}"
        if add and request_id not in waiting:
            waiting[request_id] = make_request(request_id, arrived_at=float(arrived_at))
            gate.add(waiting[request_id])
        elif not add:
            waiting.pop(request_id, None)
            gate.remove(request_id)
        first = min(waiting.values(), key=lambda one: (one.arrived_at, one.request_id), default=None)
        assert gate.head(0.0) == first
        assert len(gate) == len(waiting)


def test_the_least_loaded_pair_wins(make_request):
    pool = pool_of()
    pool["p0"].credit(RequestKey("a", 1), tokens=10, blocks=0)
    pool["d1"].credit(RequestKey("a", 1), tokens=0, blocks=1)
    assert choose(pool, make_request()) == Pair("p1", "d0")


def test_a_prefill_worker_has_room_below_two_batches(make_request):
    pool = pool_of(prefill=1, decode=1)
    pool["p0"].credit(RequestKey("a", 1), tokens=199, blocks=0)
    assert choose(pool, make_request()) == Pair("p0", "d0")
    pool["p0"].credit(RequestKey("b", 1), tokens=1, blocks=0)
    assert choose(pool, make_request()) is None
    pool["p0"].release(RequestKey("a", 1))
    assert choose(pool, make_request()) == Pair("p0", "d0")


def test_a_decode_worker_needs_blocks_for_the_prompt_and_for_those_who_grow(make_request):
    pool = pool_of(decode=1, num_blocks=8)
    pool["d0"].credit(RequestKey("a", 1), tokens=0, blocks=4)
    # Four are free: two for the prompt, one for the answer's beginning, and one stays free for "a".
    assert choose(pool, make_request(prompt_tokens=32, max_tokens=96)) is not None
    assert choose(pool, make_request(prompt_tokens=33, max_tokens=95)) is None
    # An answer that fills its last block sets no other aside.
    assert choose(pool, make_request(prompt_tokens=33, max_tokens=15)) is not None
    pool["d0"].release(RequestKey("a", 1))
    assert choose(pool, make_request(prompt_tokens=33, max_tokens=95)) is not None


def test_a_request_is_not_placed_where_its_answer_could_never_end(make_request):
    pool = pool_of(decode=1, num_blocks=8)
    pool.add(WorkerView("a-small-one", 1, Role.DECODE, WorkerCapacity(16, 4, 4, 100)))
    assert choose(pool, make_request(prompt_tokens=16, max_tokens=48)).decode == "a-small-one"
    assert choose(pool, make_request(prompt_tokens=16, max_tokens=49)).decode == "d0"


def test_a_decode_worker_takes_two_batches_of_sequences(make_request):
    pool = pool_of(decode=1, max_num_seqs=1)
    pool["d0"].credit(RequestKey("a", 1), tokens=0, blocks=1)
    assert choose(pool, make_request()) is not None
    pool["d0"].credit(RequestKey("b", 1), tokens=0, blocks=1)
    assert choose(pool, make_request()) is None


def test_workers_that_are_down_refused_or_do_not_reach_each_other_are_left_out(make_request):
    pool = pool_of()
    pool["p0"].up = False
    pool["d0"].refuse()
    assert choose(pool, make_request()) == Pair("p1", "d1")
    assert choose(pool, make_request(), excluded={Pair("p1", "d1")}) is None


def test_a_prompt_is_not_placed_where_it_could_never_fit(make_request):
    pool = pool_of(prefill=1)
    pool.add(WorkerView("a-small-one", 1, Role.PREFILL, WorkerCapacity(16, 2, 4, 100)))
    assert choose(pool, make_request(prompt_tokens=32)).prefill == "a-small-one"
    assert choose(pool, make_request(prompt_tokens=33)).prefill == "p0"


def test_admission(make_request):
    admission = Admission(max_gated_requests=2, retry_after_s=3.0)
    assert admission.refuse(make_request(), pool_of(), gated_requests=1) is None
    full = admission.refuse(make_request(), pool_of(), gated_requests=2)
    assert isinstance(full.error, OverloadedError)
    assert (full.reason, full.counts, full.error.retry_after_s) == ("gate_full", True, 3.0)
    alone = admission.refuse(make_request(), pool_of(decode=0), gated_requests=0)
    assert isinstance(alone.error, NoWorkersError)
    assert "no decode worker" in str(alone.error)
    huge = admission.refuse(make_request(prompt_tokens=65, max_tokens=64), pool_of(num_blocks=8), 0)
    assert isinstance(huge.error, PromptTooLongError)
    assert (huge.reason, huge.counts) == ("never_fits", False)
    assert "largest decode worker has 8: at most 128 tokens" in str(huge.error)
    pool = pool_of(decode=0, num_blocks=2)
    pool.add(WorkerView("d0", 1, Role.DECODE, WorkerCapacity(16, 64, 4, 100)))
    huge = admission.refuse(make_request(prompt_tokens=33, max_tokens=1), pool, 0)
    assert "largest prefill worker has 2: at most 32 tokens" in str(huge.error)


def test_what_becomes_of_failures():
    def judge(reason, num_emitted=0, num_unreachable=1):
        failed = worker_pb2.Failed(request_id="r", attempt=1, reason=reason, message="why")
        return judge_failure("d0", failed, num_emitted=num_emitted, num_unreachable=num_unreachable)

    assert judge(worker_pb2.FAILURE_REASON_NO_BLOCKS) is Retry.WHEN_THERE_IS_ROOM
    assert judge(worker_pb2.FAILURE_REASON_PEER_UNREACHABLE) is Retry.ON_ANOTHER_PAIR
    for error, kind in (
        (judge(worker_pb2.FAILURE_REASON_NO_BLOCKS, num_emitted=1), HandoffFailedError),
        (judge(worker_pb2.FAILURE_REASON_PEER_UNREACHABLE, num_emitted=1), HandoffFailedError),
        (judge(worker_pb2.FAILURE_REASON_PEER_UNREACHABLE, 0, MAX_UNREACHABLE_PAIRS), HandoffFailedError),
        (judge(worker_pb2.FAILURE_REASON_PEER_MISMATCH), HandoffFailedError),
        (judge(worker_pb2.FAILURE_REASON_TRANSFER_FAILED), HandoffFailedError),
        (judge(worker_pb2.FAILURE_REASON_LEASE_EXPIRED), HandoffFailedError),
        (judge(worker_pb2.FAILURE_REASON_INVALID), InvalidRequestError),
        (judge(worker_pb2.FAILURE_REASON_INTERNAL), WorkerFailedError),
        (judge(99), HandoffFailedError),
    ):
        assert type(error) is kind
        assert "worker d0: why" in str(error)
