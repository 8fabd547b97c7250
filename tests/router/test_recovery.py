"""Which losses are made up for, and that both limits hold whatever happens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prelay.v1 import worker_pb2

from router.errors import HandoffFailedError, InvalidRequestError, WorkerFailedError, WorkerLostError
from router.recovery import Cause, Loss, Recovery, RetryBudget, Verdict, judge_failed, pause_s, worker_lost

REASON = worker_pb2.FailureReason


def judge(reason):
    return judge_failed("d0", worker_pb2.Failed(request_id="r", attempt=1, reason=reason, message="why"))


def test_what_becomes_of_failures():
    assert judge(REASON.FAILURE_REASON_NO_BLOCKS) is Verdict.WAIT_FOR_ROOM
    invalid = judge(REASON.FAILURE_REASON_INVALID)
    assert isinstance(invalid, InvalidRequestError)
    for reason, cause, kind in (
        (REASON.FAILURE_REASON_PEER_UNREACHABLE, Cause.PEER_UNREACHABLE, HandoffFailedError),
        (REASON.FAILURE_REASON_PEER_MISMATCH, Cause.PEER_MISMATCH, HandoffFailedError),
        (REASON.FAILURE_REASON_TRANSFER_FAILED, Cause.TRANSFER_FAILED, HandoffFailedError),
        (REASON.FAILURE_REASON_LEASE_EXPIRED, Cause.LEASE_EXPIRED, HandoffFailedError),
        (REASON.FAILURE_REASON_INTERNAL, Cause.INTERNAL, WorkerFailedError),
        (REASON.FAILURE_REASON_UNSPECIFIED, Cause.INTERNAL, WorkerFailedError),
        (99, Cause.INTERNAL, WorkerFailedError),  # of a later minor version
    ):
        loss = judge(reason)
        assert loss == Loss(cause, "worker d0: why")
        error = loss.error("no more")
        assert type(error) is kind
        assert str(error) == "worker d0: why; no more"
    error = worker_lost("p0", "it ended the stream").error("no more")
    assert type(error) is WorkerLostError
    assert "worker p0 was lost while it served this request (it ended the stream)" in str(error)


@given(max_attempts=st.integers(1, 8), losses=st.integers(1, 20))
def test_a_request_is_placed_so_often_and_no_more(max_attempts, losses):
    recovery = Recovery(max_attempts, RetryBudget(share=0.0, burst=1000))
    verdicts = [recovery.judge(Loss(Cause.INTERNAL, "why"), lost) for lost in range(1, losses + 1)]
    again = [verdict for verdict in verdicts if verdict is Verdict.PLACE_AGAIN]
    assert verdicts[: len(again)] == again
    assert len(again) == min(losses, max_attempts - 1)


def test_a_request_that_has_used_its_attempts_takes_nothing_from_the_budget():
    recovery = Recovery(2, RetryBudget(share=0.0, burst=1))
    assert "limit (router.max_attempts)" in str(recovery.judge(Loss(Cause.INTERNAL, "why"), 2))
    assert recovery.judge(Loss(Cause.INTERNAL, "why"), 1) is Verdict.PLACE_AGAIN
    assert "(router.retry_budget)" in str(recovery.judge(Loss(Cause.INTERNAL, "why"), 1))


class BudgetMachine(RuleBasedStateMachine):
    """Requests come and go, workers collapse at the worst moments."""

    def __init__(self):
        super().__init__()
        self.share, self.burst = 0.5, 3
        self.budget = RetryBudget(self.share, self.burst)
        self.live = self.admitted = self.taken = 0

    @rule()
    def admit(self):
        self.budget.admitted()
        self.live += 1
        self.admitted += 1

    @precondition(lambda self: self.live)
    @rule()
    def end(self):
        self.budget.ended()
        self.live -= 1

    @precondition(lambda self: self.live)
    @rule(wanted=st.integers(1, 10))
    def lose(self, wanted):
        taken = sum(self.budget.take() for _ in range(wanted))
        # Nothing is saved up beyond the burst and what the requests that live now have brought.
        assert taken <= self.burst + self.share * self.live
        self.taken += taken

    @invariant()
    def retries_are_a_share_of_the_load(self):
        assert self.taken <= self.burst + self.share * self.admitted


TestBudget = BudgetMachine.TestCase
TestBudget.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_the_burst_is_there_from_the_start_and_the_share_comes_with_each_request():
    budget = RetryBudget(share=0.5, burst=2)
    assert [budget.take() for _ in range(3)] == [True, True, False]
    budget.admitted()
    assert not budget.take()
    budget.admitted()
    assert [budget.take(), budget.take()] == [True, False]


@pytest.mark.parametrize("idle_requests", [0, 100])
def test_quiet_times_are_not_saved_up(idle_requests):
    budget = RetryBudget(share=1.0, burst=2)
    for _ in range(idle_requests):
        budget.admitted()
        budget.ended()
    assert sum(budget.take() for _ in range(50)) == 2


def test_attempts_that_workers_fail_have_time_between_them():
    """One is made up for at once; who is gone is in nobody's way."""
    pauses = [pause_s(Loss(Cause.PEER_UNREACHABLE, "why"), lost) for lost in range(1, 10)]
    assert pauses[:4] == [0.0, 0.05, 0.1, 0.2]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 1.0
    assert [pause_s(Loss(Cause.WORKER_LOST, "why"), lost) for lost in range(1, 10)] == [0.0] * 9
