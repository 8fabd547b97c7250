"""Where a request goes when the least loaded workers are taken, and when there is no room."""

from __future__ import annotations

from engine.sequence import RequestKey
from router.pair_table import LinkState, Pair, PairLink
from router.placement.base import Kind
from router.placement.least_loaded import LeastLoadedPlacement
from router.pool_view import PoolView, Role, WorkerCapacity, WorkerView


def pool_of(prefill=2, decode=2, num_blocks=64, max_num_seqs=4, max_batch_tokens=100):
    pool = PoolView()
    capacity = WorkerCapacity(16, num_blocks, max_num_seqs, max_batch_tokens)
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


def choose(pool, request, avoid=()):
    """The pair that is chosen, if there is one."""
    decision = LeastLoadedPlacement(pool).choose(request, avoid, now=0.0)
    if decision is None:
        return None
    assert decision.kind is Kind.DISAGGREGATED
    return Pair(decision.prefill, decision.decode)


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
    linked(pool)
    assert choose(pool, make_request(prompt_tokens=16, max_tokens=48)).decode == "a-small-one"
    assert choose(pool, make_request(prompt_tokens=16, max_tokens=49)).decode == "d0"


def test_a_decode_worker_takes_two_batches_of_sequences(make_request):
    pool = pool_of(decode=1, max_num_seqs=1)
    pool["d0"].credit(RequestKey("a", 1), tokens=0, blocks=1)
    assert choose(pool, make_request()) is not None
    pool["d0"].credit(RequestKey("b", 1), tokens=0, blocks=1)
    assert choose(pool, make_request()) is None


def test_workers_that_are_down_suspected_refused_or_not_linked_are_left_out(make_request):
    pool = pool_of(prefill=3)
    pool.down("p0")
    pool["p1"].suspected = True
    pool["d0"].refuse()
    assert choose(pool, make_request()) == Pair("p2", "d1")
    for state in (LinkState.LINKING, LinkState.UNREACHABLE, LinkState.MISMATCHED):
        pool.pairs.put(Pair("p2", "d1"), PairLink(state))
        assert choose(pool, make_request()) is None
    pool["p1"].suspected = False
    assert choose(pool, make_request()) == Pair("p1", "d1")
    pool["p1"].refuse()
    assert choose(pool, make_request()) is None


def test_a_worker_that_has_failed_the_request_is_the_last_choice(make_request):
    pool = pool_of()
    assert choose(pool, make_request(), avoid={"p0", "d0"}) == Pair("p1", "d1")
    pool.down("p1")
    assert choose(pool, make_request(), avoid={"p0", "d0"}) == Pair("p0", "d1")


def test_room_is_for_the_prompt_and_what_there_is_of_the_answer(make_request):
    pool = pool_of(prefill=1, decode=1, num_blocks=8)
    pool["d0"].credit(RequestKey("a", 1), tokens=0, blocks=3)
    request = make_request(prompt_tokens=16, max_tokens=100)
    assert choose(pool, request.going_on(range(32))) is not None  # 3 blocks, one more, one stays free
    assert choose(pool, request.going_on(range(33))) is None
    small = PoolView()
    small.add(WorkerView("p0", 1, Role.PREFILL, WorkerCapacity(16, 2, 0, 100)))
    small.add(WorkerView("d0", 1, Role.DECODE, WorkerCapacity(16, 64, 4, 100)))
    linked(small)
    assert choose(small, request.going_on(range(16))) is not None
    assert choose(small, request.going_on(range(17))) is None


def test_a_prompt_is_not_placed_where_it_could_never_fit(make_request):
    pool = pool_of(prefill=1)
    pool.add(WorkerView("a-small-one", 1, Role.PREFILL, WorkerCapacity(16, 2, 4, 100)))
    linked(pool)
    assert choose(pool, make_request(prompt_tokens=32)).prefill == "a-small-one"
    assert choose(pool, make_request(prompt_tokens=33)).prefill == "p0"


def test_the_answer_goes_where_it_fits_though_another_has_more_blocks(make_request):
    pool = pool_of(decode=0)
    pool.add(WorkerView("d0", 1, Role.DECODE, WorkerCapacity(16, 8, 4, 100)))
    pool.add(WorkerView("d1", 1, Role.DECODE, WorkerCapacity(64, 4, 4, 100)))
    assert choose(linked(pool), make_request(prompt_tokens=56, max_tokens=200)) == Pair("p0", "d1")
