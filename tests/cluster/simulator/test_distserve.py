"""The rules of DistServe's simulator: by hand, by closed forms, and by an interpreter without shortcuts."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.simulator.distserve import (
    MOST_CONTEXT,
    Pool,
    simulate_distserve,
    simulate_distserve_colocated,
)
from cluster.simulator.distserve_profile import StepTimes
from cluster.simulator.errors import SimulationError
from cluster.workload.datasets import Shape
from cluster.workload.drawing import Arrival

TIMES = StepTimes((18.0, 0.1, 7e-6), (20.0, 6e-4, 0.04), (7.0, 5.8e-4, 0.16), 95, 1, 66_144)


def times(pp: int = 1, capacity: int = 66_144) -> StepTimes:
    return StepTimes(TIMES.prefill, TIMES.decode_small, TIMES.decode_large, TIMES.large_from, pp, capacity)


def arrivals(*requests: tuple[float, int, int]) -> list[Arrival]:
    return [Arrival(at, Shape(prompt, output)) for at, prompt, output in requests]


requests_st = st.lists(
    st.tuples(st.floats(0, 3).map(lambda value: round(value, 3)), st.integers(1, 30_000), st.integers(1, 40)),
    min_size=1,
    max_size=25,
).map(sorted)


def test_one_request_alone_by_hand() -> None:
    [row] = simulate_distserve(arrivals((1.0, 512, 3)), Pool(TIMES), Pool(TIMES))
    prefill_ms = 18 + 0.1 * 512 + 7e-6 * 512**2 + 1 + 2 + 1e-4 * 512
    decode_ms = sum(20 + 6e-4 * (512 + step + 1) + 0.04 + 2 + 1e-4 * (512 + step) for step in range(3))
    assert row.ttft_s == pytest.approx(prefill_ms / 1000)
    assert row.tpot_s == pytest.approx(decode_ms / 3 / 1000)


def test_prompts_that_wait_are_read_together() -> None:
    rows = simulate_distserve(
        arrivals((0.0, 1000, 1), (0.01, 100, 1), (0.02, 200, 1)), Pool(TIMES), Pool(TIMES)
    )
    first_s = TIMES.prefill_s([1000], is_first=True)
    both_s = TIMES.prefill_s([100, 200], is_first=True)
    assert [row.ttft_s for row in rows] == pytest.approx(
        [first_s, first_s + both_s - 0.01, first_s + both_s - 0.02]
    )


def test_a_batch_takes_what_fits_in_order() -> None:
    small = times(capacity=1000)
    rows = simulate_distserve(
        arrivals((0.0, 10, 1), (0.001, 800, 1), (0.001, 300, 1), (0.001, 100, 1)), Pool(small), Pool(small)
    )
    ends = [row.arrival_s + (row.ttft_s or 0) for row in rows]
    assert ends[1] < ends[2] == ends[3]  # 800 + 300 are too many, and 100 waits for its turn


def test_stages_overlap_and_each_has_its_part() -> None:
    two = times(pp=2)
    rows = simulate_distserve(arrivals((0.0, 600, 1), (0.001, 600, 1)), Pool(two), Pool(TIMES))
    first_s = two.prefill_s([600], is_first=True)
    second_s = two.prefill_s([600], is_first=False)
    assert rows[0].ttft_s == pytest.approx(first_s + second_s)
    assert rows[1].ttft_s == pytest.approx(2 * first_s + second_s - 0.001)


def test_prefill_alone_is_an_m_d_1_queue_where_batches_save_nothing() -> None:
    """DistServe, equation 1: TTFT = D + R D^2 / (2 (1 - R D)). With steps that cost by the token alone, a
    batch takes as long as its prompts one by one, and who is read last of it ends when it would have."""
    linear = StepTimes((0.0, 0.1, 0.0), (1.0, 0.0, 0.0), (1.0, 0.0, 0.0), 95, 1, 700)
    each_s = linear.prefill_s([500], is_first=True)  # one prompt of 500 fits into a batch, not two
    rate, count = 0.6 / each_s, 60_000
    at = np.cumsum(np.random.default_rng(0).exponential(1 / rate, count))
    rows = simulate_distserve(
        [Arrival(float(one), Shape(500, 1)) for one in at], Pool(linear), Pool(linear, replicas=1)
    )
    expected_s = each_s + rate * each_s**2 / (2 * (1 - rate * each_s))
    assert np.mean([row.ttft_s for row in rows]) == pytest.approx(expected_s, rel=0.03)


def test_decode_alone_follows_the_batch_formula() -> None:
    """All come at once, and none is read: each step holds all, so TPOT is the mean of their step times."""
    free = StepTimes((-2.0, 0.0, 0.0), TIMES.decode_small, TIMES.decode_large, 95, 1, 10**9)
    num, prompt, output = 120, 100, 20
    rows = simulate_distserve(arrivals(*[(0.0, prompt, output)] * num), Pool(free), Pool(TIMES))
    steps = [TIMES.decode_s(num, num * (prompt + step), is_first=True) for step in range(output)]
    assert {round(row.tpot_s or 0, 9) for row in rows} == {round(sum(steps) / output, 9)}


def test_a_step_has_a_most_of_context_and_the_rest_goes_first_next_time() -> None:
    free = StepTimes((-2.0, 0.0, 0.0), TIMES.decode_small, TIMES.decode_large, 95, 1, 10**9)
    prompt = MOST_CONTEXT // 2 - 1  # two fit into a step, once
    two_s = TIMES.decode_s(2, 2 * prompt, is_first=True)
    rows = simulate_distserve(arrivals(*[(0.0, prompt - 5, 2)] * 3), Pool(free), Pool(TIMES))
    # Steps: the first two, the third with the first (put back behind it), the second and the third.
    assert [(row.tpot_s or 0) * 2 for row in rows] == pytest.approx(
        [2 * two_s, 3 * two_s, 3 * two_s], rel=0.01
    )


def test_colocated_reads_first() -> None:
    rows = simulate_distserve_colocated(arrivals((0.0, 100, 50), (0.2, 5000, 1)), Pool(TIMES))
    apart = simulate_distserve(arrivals((0.0, 100, 50), (0.2, 5000, 1)), Pool(TIMES), Pool(TIMES))
    stall_s = TIMES.prefill_s([5000], is_first=True)
    assert (rows[0].tpot_s or 0) * 50 == pytest.approx((apart[0].tpot_s or 0) * 50 + stall_s, rel=0.01)
    assert (rows[1].ttft_s or 0) < stall_s + 0.03  # it waits for a step, not for the answer


def test_what_fits_nowhere_is_refused() -> None:
    with pytest.raises(SimulationError, match=r"request 1: its prompt has 2000 tokens, but only 1000 fit"):
        simulate_distserve(
            arrivals((0, 10, 1), (0, 2000, 1)), Pool(times(capacity=1000)), Pool(times(capacity=1000))
        )
    with pytest.raises(SimulationError, match="50000 tokens"):
        simulate_distserve(arrivals((0, 49_990, 11)), Pool(TIMES), Pool(TIMES))


@pytest.mark.parametrize("colocated", [False, True])
@given(requests_st)
def test_counting_together_changes_nothing(colocated: bool, requests: list[tuple[float, int, int]]) -> None:
    """Against an interpreter of the rules without any shortcut."""
    found = (
        simulate_distserve_colocated(arrivals(*requests), Pool(TIMES))
        if colocated
        else simulate_distserve(arrivals(*requests), Pool(TIMES), Pool(TIMES))
    )
    expected = literally(requests, colocated=colocated)
    assert [row.ttft_s for row in found] == pytest.approx([ttft_s for ttft_s, _ in expected])
    assert [row.tpot_s for row in found] == pytest.approx([tpot_s for _, tpot_s in expected])


def literally(requests: list[tuple[float, int, int]], *, colocated: bool) -> list[tuple[float, float]]:
    """(ttft_s, tpot_s) of each, on one worker for each phase or one for both, step by step."""
    steps_done = [0] * len(requests)
    first, ended = [math.nan] * len(requests), [math.nan] * len(requests)
    prompts: deque[int] = deque()
    answers: deque[int] = deque()
    # Worker 0 reads, worker 1 writes, and so does worker 0 if colocated.
    # What each does: when it ends, what it is, whom it concerns.
    busy: dict[int, tuple[float, str, list[int]] | None] = {0: None} if colocated else {0: None, 1: None}
    coming = deque(range(len(requests)))
    now = 0.0
    while coming or prompts or answers or any(busy.values()):
        moments = [under_way[0] for under_way in busy.values() if under_way is not None]
        now = min([*moments, *(requests[one][0] for one in list(coming)[:1])])
        while coming and requests[coming[0]][0] <= now:
            prompts.append(coming.popleft())
        for worker, under_way in busy.items():
            if under_way is None or under_way[0] > now:
                continue
            _, what, batch = under_way
            busy[worker] = None
            for one in batch:
                if what == "read":
                    first[one] = now
                    answers.append(one)
                else:
                    steps_done[one] += 1
                    if steps_done[one] < requests[one][2]:
                        answers.append(one)
                    else:
                        ended[one] = now
        for worker in busy:
            if busy[worker] is not None:
                continue
            if worker == 0 and prompts:
                room, batch = TIMES.capacity, []
                while prompts and requests[prompts[0]][1] <= room:
                    batch.append(prompts.popleft())
                    room -= requests[batch[-1]][1]
                lengths = [requests[one][1] for one in batch]
                took = TIMES.prefill_s(lengths, is_first=True)
                busy[worker] = (now + took, "read", batch)
            elif (worker == 1 or colocated) and answers:
                room, batch, context = MOST_CONTEXT, [], 0
                while answers and (size := requests[answers[0]][1] + steps_done[answers[0]]) + 1 <= room:
                    batch.append(answers.popleft())
                    room -= size + 1
                    context += size
                took = TIMES.decode_s(len(batch), context, is_first=True)
                busy[worker] = (now + took, "write", batch)
    return [
        (first[one] - at, (ended[one] - first[one]) / output) for one, (at, _, output) in enumerate(requests)
    ]
