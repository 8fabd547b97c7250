"""Log-probabilities come out with the text of their tokens: not before it, and not without it."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from engine.sequence import StopReason, TokenLogprobs
from router.record import RequestRecord, TokenBatch


class Letters:
    """A detokenizer for token ids that are characters; '~' is the first half of the character after it, and
    '_' is a special token, which is no text."""

    def __init__(self):
        self.held = ""

    def push(self, token_id):
        if chr(token_id) == "_":
            return ""
        self.held += chr(token_id)
        if self.held.endswith("~"):
            return ""
        text, self.held = self.held, ""
        return text

    def flush(self):
        return self.held


def scores(text, start):
    return [TokenLogprobs(ord(letter), -float(at), 1, ()) for at, letter in enumerate(text, start=start)]


@given(data=st.data())
def test_exactly_the_tokens_whose_text_is_out_are_scored(data, make_request):
    text = data.draw(st.text("abc~_", min_size=1, max_size=14))
    stop = tuple(data.draw(st.lists(st.text("abc", min_size=1, max_size=3), max_size=2)))
    reason = data.draw(st.sampled_from(StopReason))
    edges = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text))))})
    record = RequestRecord(make_request(stop=stop, logprobs=0), Letters())
    record.place(0.0, "p", "d")
    spelled = text[:-1] if reason is StopReason.STOP else text
    # A token's text is complete with the next letter; until then it has not begun.
    letters = [at + 1 for at, letter in enumerate(spelled) if letter in "abc"]
    closes = [next((at for at in letters if at > index), len(spelled)) for index in range(len(spelled))]
    opens = [max((at for at in letters if at <= index), default=0) for index in range(len(spelled))]
    ends, starts = ([len(spelled[:at].replace("_", "")) for at in edge] for edge in (closes, opens))
    out, logprobs, scored = "", [], []
    for start, end in itertools.pairwise(edges):
        batch = TokenBatch(
            start, [ord(letter) for letter in text[start:end]], reason if end == len(text) else None,
            logprobs=scores(text[start:end], start),
        )  # fmt: skip
        delta = record.tokens(1.0, batch)
        if delta is None:
            break  # a stop string has ended the answer
        out += delta.text
        logprobs += delta.logprobs
        scored += delta.scored
        assert len(delta.logprobs) == len(delta.token_ids)
        # Of tokens that are no text it counts whether what closes them has come.
        known = max((at for at in letters if at <= len(logprobs)), default=0)
        if delta.finish and out == spelled.replace("_", ""):
            known = len(spelled)
        count = sum(token_end <= len(out) for token_end in ends[:known])
        assert [one.logprobs for one in scored] == scores(spelled[:count], 0)
        assert [one.start for one in scored] == starts[:count]
    assert logprobs == scores(text[: len(logprobs)], 0)
    if out == spelled.replace("_", ""):
        assert [one.logprobs for one in scored] == scores(spelled, 0)


def test_nothing_is_scored_that_was_not_asked_for(make_request):
    record = RequestRecord(make_request(), Letters())
    record.place(0.0, "p", "d")
    delta = record.tokens(1.0, TokenBatch(0, [97, 98], StopReason.LENGTH))
    assert (delta.logprobs, delta.scored, delta.prompt_logprobs) == ((), (), ())


def test_the_prompts_come_with_the_first_token_of_the_attempt_that_gave_it(make_request):
    record = RequestRecord(make_request(prompt_logprobs=0), Letters())
    record.place(0.0, "p", "d")
    record.lost(1.0)
    record.place(2.0, "p", "d")
    late = record.tokens(3.0, TokenBatch(1, [98], None))
    assert late is None
    first = record.tokens(4.0, TokenBatch(0, [97], None, prompt_logprobs=scores("xyz", 1), cached_tokens=2))
    assert (first.token_ids, first.prompt_logprobs) == ((97, 98), tuple(scores("xyz", 1)))
    last = record.tokens(5.0, TokenBatch(2, [99], StopReason.LENGTH))
    assert last.prompt_logprobs == ()
    assert last.finish.cached_tokens == 2
