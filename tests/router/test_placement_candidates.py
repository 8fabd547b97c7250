"""A decision weighs a few workers, however many there are."""

from __future__ import annotations

import random

from engine.prefix_digests import prefix_digests, short
from engine.sequence import RequestKey
from router.placement.candidates import MOST_LOOKED_AT, MOST_WEIGHED, Candidates
from router.pool_view import Role
from router.prefix_index import PrefixIndex
from tests.router.pools import pool_of


def candidates_of(pool, seed=0, load=lambda worker: worker.outstanding_tokens):
    prefixes = PrefixIndex(pool)
    return prefixes, Candidates(pool, prefixes, random.Random(seed), (Role.PREFILL,), load)


def ids(workers):
    return {worker.worker_id for worker in workers}


def anybody(worker):
    return True


def test_a_small_pool_is_weighed_as_a_whole(make_request):
    pool = pool_of(prefill=MOST_WEIGHED, decode=1)
    pool["p3"].suspected = True
    _, candidates = candidates_of(pool)
    found = candidates.look(make_request(), lambda worker: worker.worker_id != "p5")
    assert ids(found) == {f"p{index}" for index in range(MOST_WEIGHED)} - {"p3", "p5"}


def test_of_a_larger_one_those_with_room_and_least_load(make_request):
    pool = pool_of(prefill=MOST_LOOKED_AT)
    for index in range(MOST_LOOKED_AT):
        pool[f"p{index}"].credit(RequestKey(f"r{index}", 1), tokens=100 * (index + 1), blocks=0)
    _, candidates = candidates_of(pool)
    found = candidates.look(make_request(), lambda worker: worker.worker_id != "p0")
    assert ids(found) == {f"p{index}" for index in range(1, MOST_WEIGHED + 1)}


def test_of_a_large_one_others_each_time_and_the_best_of_the_last_times(make_request):
    pool = pool_of(prefill=500)
    looked_at = []

    def load(worker):
        looked_at.append(worker.worker_id)
        return 0

    _, candidates = candidates_of(pool, load=load)
    first = ids(candidates.look(make_request(), anybody))
    assert len(first) == MOST_WEIGHED
    assert len(looked_at) == MOST_LOOKED_AT
    for number in range(6):
        candidates.remember(f"p{number}")
    looked_at.clear()
    assert ids(candidates.look(make_request(), anybody)) != first
    assert {"p2", "p3", "p4", "p5"} <= set(looked_at)
    assert len(looked_at) <= MOST_LOOKED_AT + 4
    pool["p5"].suspected = True
    looked_at.clear()
    candidates.look(make_request(), anybody)
    assert "p5" not in looked_at


def test_who_holds_a_part_of_the_prompt_is_among_them_if_it_has_room(make_request):
    pool = pool_of(prefill=500)
    prefixes, candidates = candidates_of(pool)
    request = make_request(prompt_tokens=160)
    pool["p499"].credit(RequestKey("busy", 1), tokens=9999, blocks=0)
    capacity = pool["p499"].capacity
    digests = prefix_digests(capacity.fingerprint, "", capacity.block_size, request.prompt_token_ids)
    prefixes.stored("p499", map(short, digests))
    assert "p499" in ids(candidates.look(request, anybody))
    assert "p499" not in ids(candidates.look(request, lambda worker: worker.worker_id != "p499"))
