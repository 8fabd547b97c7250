"""What the gate sees of the workers that read."""

from __future__ import annotations

import pytest

from router.estimates import LocalEstimate, PrefillEstimate
from router.gate.readers import Readers
from router.pool_view import PoolView, Role, WorkerCapacity, WorkerView

CAPACITY = WorkerCapacity(16, 100, 4, 100)


class Predictions:
    """Waiting times by worker; reading takes a second, and half of it where the prompt is held."""

    def __init__(self, holders=()):
        self.wait_s, self.held_by, self.asked, self.known_s = {}, holders, [], 1.0

    def read_s(self, request):
        return self.known_s

    def _compute_s(self, worker):
        return self.known_s / 2 if worker.worker_id in self.held_by else self.known_s

    def prefill(self, worker, request, now):
        assert worker.role is Role.PREFILL
        self.asked.append(worker.worker_id)
        return PrefillEstimate(self.wait_s.get(worker.worker_id, 5.0), self._compute_s(worker), 0)

    def local(self, worker, request, now):
        assert worker.role is Role.MIXED
        self.asked.append(worker.worker_id)
        wait_s = self.wait_s.get(worker.worker_id, 5.0)
        return LocalEstimate(wait_s, 2 * self._compute_s(worker), 0.02, 16, 0)

    def holders(self, request):
        return self.held_by


def readers_of(predictions, prefill=2, mixed=0):
    pool = PoolView()
    pool.add(WorkerView("d", 1, Role.DECODE, CAPACITY))
    for index in range(prefill):
        pool.add(WorkerView(f"p{index}", 1, Role.PREFILL, CAPACITY))
    for index in range(mixed):
        pool.add(WorkerView(f"m{index}", 1, Role.MIXED, CAPACITY))
    return pool, Readers(pool, predictions, predictions)


def test_prefill_and_mixed_workers_read_unless_they_are_down_or_suspected(make_request):
    predictions = Predictions()
    pool, readers = readers_of(predictions, prefill=3, mixed=1)
    assert len(readers) == 4
    predictions.wait_s = {"p0": 0.1, "p1": 0.2, "m0": 0.5}
    pool.down("p0")
    pool["p1"].suspected = True
    assert len(readers) == 2
    assert readers.wait_s(make_request(), 0.0) == 0.5
    assert readers.ttft_s(make_request(), 0.0) == 2.5
    assert set(predictions.asked) == {"p2", "m0"}


def test_without_readers_nothing_is_waited_for(make_request):
    _, readers = readers_of(Predictions(), prefill=0)
    assert (len(readers), readers.wait_s(make_request(), 0.0), readers.ttft_s(make_request(), 0.0)) == (
        0,
        0,
        0,
    )


def test_a_question_looks_at_few_of_many_and_all_have_their_turn(make_request):
    predictions = Predictions()
    _, readers = readers_of(predictions, prefill=40)
    readers.wait_s(make_request(), 0.0)
    assert len(predictions.asked) == 8
    for _ in range(4):
        readers.ttft_s(make_request(), 0.0)
    assert len(set(predictions.asked)) == 40


def test_a_few_prefill_workers_are_not_missed_among_many_mixed_ones(make_request):
    predictions = Predictions()
    _, readers = readers_of(predictions, prefill=2, mixed=40)
    predictions.wait_s = {"p0": 0.1, "p1": 0.1}
    assert [readers.wait_s(make_request(), 0.0) for _ in range(9)] == [0.1] * 9
    assert {f"m{index}" for index in range(40)} < set(predictions.asked)


def test_who_holds_the_prompt_is_always_looked_at(make_request):
    predictions = Predictions(holders=("p7", "gone", "d"))
    pool, readers = readers_of(predictions, prefill=40)
    predictions.wait_s = {"p7": 0.1}
    assert [readers.wait_s(make_request(), 0.0) for _ in range(5)] == [0.1] * 5
    assert readers.read_s(make_request()) == 0.5
    pool.down("p7")
    assert readers.read_s(make_request()) == 1.0


def test_of_reading_that_is_not_known_only_the_order_is(make_request):
    predictions = Predictions()
    predictions.known_s = 0.0
    _, readers = readers_of(predictions)
    short, long = (readers.read_s(make_request(prompt_tokens=tokens)) for tokens in (10, 1000))
    assert 0 < short < long == pytest.approx(0.0, abs=1e-5)
