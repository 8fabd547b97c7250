"""What is noted of one answer, and the events that it comes in."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.answer import Answer
from bench.load.sse import EventParser
from cluster.workload.jobs import Job, Row, Status

JOB = Job(3.0, [1, 2, 3], 8)


class Clock:
    """Seconds since the run began at 100."""

    def __init__(self) -> None:
        self.now = 103.5

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float) -> None:
        self.now += seconds


def row_of(tell: Callable[[Answer, Clock], None]) -> Row:
    clock = Clock()
    answer = Answer(JOB, 100.0, clock)
    tell(answer, clock)
    return answer.row()


def test_a_complete_answer() -> None:
    def tell(answer: Answer, clock: Clock) -> None:
        clock.after(1.0)
        answer.tokens(1)
        clock.after(0.5)
        answer.tokens(2)
        clock.after(0.25)
        answer.finish("length")
        clock.after(9.0)
        answer.usage(5, 4)
        answer.stages({"gate": 0.1})

    row = row_of(tell)
    assert row.status is Status.COMPLETE
    assert (row.arrival_s, row.sent_s) == (3.0, 3.5)
    assert (row.ttft_s, row.last_s, list(row.gaps_s)) == (1.0, 1.75, [0.5])
    assert (row.prompt_tokens, row.output_tokens, row.error) == (5, 4, "")
    assert row.tpot_s == pytest.approx(0.75 / 3)
    assert row.stages == {"gate": 0.1}


def test_tokens_are_counted_where_the_server_does_not_say() -> None:
    def tell(answer: Answer, clock: Clock) -> None:
        answer.tokens(1)
        answer.tokens(2)
        answer.finish("stop")

    row = row_of(tell)
    assert (row.prompt_tokens, row.output_tokens) == (3, 3)


def test_one_token_has_a_tpot_of_nought() -> None:
    def tell(answer: Answer, clock: Clock) -> None:
        answer.tokens(1)
        clock.after(7.0)
        answer.finish("stop")

    assert row_of(tell).tpot_s == 0.0


@pytest.mark.parametrize(
    ("tell", "status", "error"),
    [
        (lambda a: None, Status.FAILED, "the stream ended without a finish reason"),
        (lambda a: a.tokens(1), Status.FAILED, "the stream ended without a finish reason"),
        (lambda a: a.finish("stop"), Status.FAILED, "complete without a token"),
        (
            lambda a: (a.tokens(1), a.finish("content_filter")),
            Status.FAILED,
            "finish reason 'content_filter'",
        ),
        (lambda a: (a.tokens(1), a.finish("stop"), a.fail("late")), Status.FAILED, "late"),
        (lambda a: (a.fail("full", Status.REJECTED), a.fail("cut")), Status.REJECTED, "full"),
    ],
)
def test_what_is_not_complete(tell: Callable[[Answer], None], status: Status, error: str) -> None:
    row = row_of(lambda answer, clock: tell(answer))
    assert (row.status, row.error) == (status, error)


EVENTS = [b'{"a": 1}', b"two\nlines", b"[DONE]"]
STREAM = b': a comment\r\n\r\ndata: {"a": 1}\r\n\r\nevent: x\ndata:two\ndata: lines\n\n\ndata: [DONE]\n\n'


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_events_do_not_depend_on_where_reads_end(cuts: list[int]) -> None:
    parser = EventParser()
    ends = [0, *sorted(cuts), len(STREAM)]
    found = [event for at, end in pairwise(ends) for event in parser.feed(STREAM[at:end])]
    assert found == EVENTS
