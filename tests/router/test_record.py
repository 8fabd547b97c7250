"""One live request: order of arrival does not matter, stages add up, outcomes follow the goodput rule."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.sequence import StopReason
from router.record import RequestRecord, TokenBatch
from router.requests import FinishReason, Outcome, Stage
from router.slo import SloLimits


class Letters:
    """A detokenizer for token ids that are characters; '~' is the first half of the character after it."""

    def __init__(self):
        self.held = ""

    def push(self, token_id):
        self.held += chr(token_id)
        if self.held.endswith("~"):
            return ""
        text, self.held = self.held, ""
        return text

    def flush(self):
        return self.held


def batches(text, cuts, reason):
    """The tokens of `text`, cut into batches at `cuts`; the last one carries the reason."""
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(text)}), len(text)]
    return [
        TokenBatch(start, [ord(letter) for letter in text[start:end]], reason if end == len(text) else None)
        for start, end in itertools.pairwise(edges)
    ]


def run(request, arrivals, start=1.0, step=0.01):
    """Feeds batches, one every `step` seconds; returns (record, text, tokens, finish)."""
    record = RequestRecord(request, Letters())
    record.place(start, "p0", "d0")
    deltas = [record.tokens(start + step * (index + 1), batch) for index, batch in enumerate(arrivals)]
    got = [delta for delta in deltas if delta is not None]
    finishes = [delta.finish for delta in got if delta.finish is not None]
    assert len(finishes) <= 1
    tokens = [token for delta in got for token in delta.token_ids]
    return record, "".join(delta.text for delta in got), tokens, finishes[0] if finishes else None


@given(data=st.data())
def test_any_order_and_any_doubling_gives_the_same_answer(data, make_request):
    text = data.draw(st.text("abc~", min_size=1, max_size=12))
    stop = tuple(data.draw(st.lists(st.text("abc", min_size=1, max_size=3), max_size=2)))
    reason = data.draw(st.sampled_from(StopReason))
    in_order = batches(text, data.draw(st.lists(st.integers(0, 12))), reason)
    doubled = in_order + data.draw(st.lists(st.sampled_from(in_order), max_size=4))
    arrivals = data.draw(st.permutations(doubled))
    request = make_request(stop=stop, min_tokens=data.draw(st.integers(0, 4)))
    _, *expected, finish = run(request, in_order)
    _, *got, other = run(request, arrivals)
    assert got == expected
    assert (finish.reason, finish.completion_tokens) == (other.reason, other.completion_tokens)
    assert len(expected[1]) == finish.completion_tokens


@given(data=st.data())
def test_a_token_by_itself_is_taken_like_a_batch_of_one(data, make_request):
    """In any order, after a loss, with and without stop strings, and after the end."""
    request = make_request(stop=data.draw(st.sampled_from([(), ("b",)])))
    records = [RequestRecord(request, Letters()) for _ in range(2)]
    for record in records:
        record.place(1.0, "p0", "d0")
    text = data.draw(st.text("abc~", min_size=1, max_size=8))
    plain = [TokenBatch(index, (ord(letter),), None) for index, letter in enumerate(text)]
    last = plain[-1]._replace(stop_reason=StopReason.LENGTH)
    arrivals = data.draw(st.lists(st.sampled_from([*plain, last]), max_size=16))
    lost_after = data.draw(st.integers(0, 16))
    for number, batch in enumerate(arrivals):
        now = 1.0 + number
        if number == lost_after and records[0].last_token_at != now:
            for record in records:
                record.lost(now)
                record.place(now, "p0", "d0")
        as_batch = records[0].tokens(now, batch)
        if batch.stop_reason is None:
            by_itself = records[1].next_token(now, batch.first_index, batch.token_ids[0])
        else:
            by_itself = records[1].tokens(now, batch)
        assert by_itself == as_batch
        for name in ("token_ids", "first_token_at", "last_token_at"):
            assert getattr(records[0], name) == getattr(records[1], name)


def test_a_stop_string_ends_the_answer_and_is_not_in_it(make_request):
    record, text, tokens, finish = run(
        make_request(stop=("END",)), batches("one END two", range(12), StopReason.LENGTH)
    )
    assert text == "one "
    assert len(tokens) == finish.completion_tokens == 7
    assert finish.reason is FinishReason.STOP
    assert record.tokens(9.0, TokenBatch(7, [32], None)) is None


def test_stop_strings_count_only_after_min_tokens(make_request):
    _, text, _, _ = run(
        make_request(stop=("E",), min_tokens=3), batches("E-E-E-", range(6), StopReason.LENGTH)
    )
    assert text == "E-E-"


def test_the_token_that_stops_the_answer_is_counted_and_is_not_text(make_request):
    _, text, tokens, finish = run(make_request(), batches("ab!", [], StopReason.STOP))
    assert (text, len(tokens), finish.completion_tokens) == ("ab", 3, 3)


def test_what_is_held_back_comes_out_at_the_end(make_request):
    _, text, _, _ = run(make_request(stop=("cd",)), batches("abc", range(3), StopReason.LENGTH))
    assert text == "abc"


REPORT = [
    st.tuples(st.sampled_from([Stage.PREFILL_QUEUE, Stage.PREFILL]), st.floats(allow_nan=True)),
    st.tuples(st.sampled_from([Stage.TRANSFER, Stage.DECODE_QUEUE]), st.floats(allow_nan=True)),
]


@given(data=st.data())
def test_stages_add_up_to_the_duration_whatever_workers_report(data, make_request):
    now = data.draw(st.floats(0, 1e6))
    record = RequestRecord(make_request(arrived_at=now), Letters())

    def later():
        nonlocal now
        now += data.draw(st.floats(0, 100))
        return now

    for _ in range(data.draw(st.integers(0, 2))):
        record.place(later(), "p", "d")
        record.lost(later())
    if data.draw(st.booleans()):
        record.place(later(), "p", "d")
        for index in range(data.draw(st.integers(0, 3))):
            times = data.draw(st.lists(REPORT[min(index, 1)], max_size=2))
            record.tokens(later(), TokenBatch(index, [97], None, times))
            if data.draw(st.booleans()):
                record.lost(later())
                record.place(later(), "p", "d")
    details = record.fail(later(), Outcome.CANCELLED)
    assert sum(details.stages.values()) == pytest.approx(details.duration_s, abs=1e-6)
    assert all(seconds >= -1e-6 for seconds in details.stages.values())


def test_stages_of_a_request_that_was_tried_twice(make_request):
    record = RequestRecord(make_request(arrived_at=10.0), Letters())
    record.place(11.0, "p0", "d0")
    record.lost(13.0)
    record.place(14.0, "p1", "d1")
    record.tokens(17.0, TokenBatch(0, [97], None, [(Stage.PREFILL_QUEUE, 0.5), (Stage.PREFILL, 2.0)]))
    record.tokens(20.0, TokenBatch(1, [98], None, [(Stage.TRANSFER, 1.0), (Stage.DECODE_QUEUE, 99.0)], 640))
    finish = record.tokens(24.0, TokenBatch(2, [99], StopReason.LENGTH)).finish
    details = finish.details
    assert details.stages == {
        Stage.GATE: 2.0, Stage.HANDOFF_RETRY: 2.0, Stage.PREFILL_QUEUE: 0.5, Stage.PREFILL: 2.0,
        Stage.FIRST_TOKEN: 0.5, Stage.TRANSFER: 1.0, Stage.DECODE_QUEUE: 6.0, Stage.DECODE: 0.0,
        Stage.RECOVERY: 0.0,
    }  # fmt: skip
    assert (details.attempt, details.prefill_worker, details.decode_worker) == (2, "p1", "d1")
    assert (details.ttft_s, details.tpot_s, details.duration_s, details.kv_bytes) == (7.0, 3.5, 14.0, 640)


@pytest.mark.parametrize(
    ("limits", "outcome"),
    [
        (SloLimits(1.0, 0.5), Outcome.GOOD),  # both exactly met: limits are inclusive
        (SloLimits(0.99, 0.5), Outcome.TTFT_MISS),
        (SloLimits(1.0, 0.49), Outcome.TPOT_MISS),
        (SloLimits(0.5, 0.1), Outcome.BOTH_MISS),
    ],
)
def test_outcomes(limits, outcome, make_request):
    record = RequestRecord(make_request(limits=limits), Letters())
    record.place(0.0, "p", "d")
    record.tokens(1.0, TokenBatch(0, [97], None))
    finish = record.tokens(2.0, TokenBatch(1, [97, 97], StopReason.LENGTH)).finish
    assert finish.details.outcome is outcome


@given(data=st.data())
def test_a_lost_worker_changes_nothing_of_the_answer(data, make_request):
    """Whatever had arrived out of order, and wherever it was cut off."""
    text = data.draw(st.text("abc~", min_size=1, max_size=12))
    stop = tuple(data.draw(st.lists(st.text("abc", min_size=1, max_size=3), max_size=2)))
    reason = data.draw(st.sampled_from(StopReason))
    request = make_request(stop=stop, min_tokens=data.draw(st.integers(0, 4)))
    whole = batches(text, range(len(text)), reason)
    _, *expected, finish = run(request, whole)
    record = RequestRecord(request, Letters())
    got = []
    for attempt in range(data.draw(st.integers(1, 4))):
        if attempt:
            record.lost(1.0)
        record.place(1.0, "p", "d")
        rest = whole[len(record.token_ids) :]
        arriving = data.draw(st.permutations(rest))[: data.draw(st.integers(0, len(rest)))]
        got += [record.tokens(1.0, batch) for batch in arriving]
        if any(delta is not None and delta.finish is not None for delta in got):
            break
    else:
        record.lost(1.0)
        record.place(1.0, "p", "d")
        got += [record.tokens(1.0, batch) for batch in whole[len(record.token_ids) :]]
    deltas = [delta for delta in got if delta is not None]
    finishes = [delta.finish for delta in deltas if delta.finish is not None]
    assert "".join(delta.text for delta in deltas) == expected[0]
    assert [token for delta in deltas for token in delta.token_ids] == expected[1]
    assert [one.completion_tokens for one in finishes] == [finish.completion_tokens]
    assert finishes[0].reason is finish.reason


def test_what_was_not_emitted_is_thrown_away_with_its_placement(make_request):
    record = RequestRecord(make_request(), Letters())
    record.place(0.0, "p", "d")
    record.tokens(1.0, TokenBatch(0, [97], None, cached_tokens=3))
    record.tokens(1.0, TokenBatch(2, [120], StopReason.STOP))
    record.lost(2.0)
    record.place(3.0, "p", "d")
    delta = record.tokens(4.0, TokenBatch(1, [98], None, cached_tokens=4))
    assert (delta.token_ids, delta.finish) == ((98,), None)
    delta = record.tokens(5.0, TokenBatch(2, [99, 100], StopReason.LENGTH))
    assert (delta.token_ids, delta.text) == ((99, 100), "cd")
    assert (delta.finish.completion_tokens, delta.finish.cached_tokens) == (4, 3)


def test_prompt_and_emitted_tokens_survive_a_failure(make_request):
    record = RequestRecord(make_request(), Letters())
    record.place(0.0, "p", "d")
    record.tokens(1.0, TokenBatch(0, [97, 98], None))
    record.fail(2.0, Outcome.ERROR)
    assert (record.token_ids, len(record.request.prompt_token_ids)) == ([97, 98], 4)
