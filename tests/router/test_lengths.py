"""How long answers will be: quantiles of those that have ended."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.lengths import OutputLengths, prompt_bin

LENGTHS = st.lists(st.integers(1, 3000), min_size=20, max_size=200)


def of(request, tenant):
    return replace(request, tenant=tenant)


def test_with_nothing_known_the_answer_is_as_long_as_it_may_be(make_request):
    assert OutputLengths().quantiles(make_request(max_tokens=70)) == (70, 70, 70)


@given(lengths=LENGTHS)
def test_quantiles_are_those_of_what_was_seen(lengths, make_request):
    seen, request = OutputLengths(window=10_000), make_request(max_tokens=10_000)
    for length in lengths:
        seen.observe(request, length)
    ordered = sorted(lengths)
    for found, share in zip(seen.quantiles(request), (0.1, 0.5, 0.9), strict=True):
        exact = ordered[max(0, -(-round(share * 1000) * len(ordered) // 1000) - 1)]
        assert found == pytest.approx(exact, rel=0.09, abs=1)


@given(
    lengths=LENGTHS, answered=st.integers(1, 40), max_tokens=st.integers(41, 100), least=st.integers(0, 50)
)
def test_they_lie_within_what_can_still_come(lengths, answered, max_tokens, least, make_request):
    seen = OutputLengths()
    request = make_request(max_tokens=max_tokens, min_tokens=min(least, max_tokens))
    for length in lengths:
        seen.observe(request, length)
    request = request.going_on(range(answered))
    low, middle, high = seen.quantiles(request)
    assert max(1, min(least, max_tokens) - answered) <= low <= middle <= high <= request.tokens_left


def test_an_answer_that_has_begun_is_compared_with_those_that_were_longer(make_request):
    seen, request = OutputLengths(), make_request(max_tokens=4000)
    for length in (10,) * 60 + (1000,) * 40:
        seen.observe(request, length)
    assert seen.quantiles(request)[:2] == (pytest.approx(10, abs=1), pytest.approx(10, abs=1))
    low, _, high = seen.quantiles(request.going_on(range(500)))
    assert low == high == pytest.approx(500, rel=0.15)
    # Nothing was ever so long: as long as it may be.
    assert seen.quantiles(request.going_on(range(3000))) == (1000, 1000, 1000)


def test_a_tenant_is_believed_when_it_has_had_enough_answers(make_request):
    seen = OutputLengths(enough=20)
    ours, theirs = of(make_request(max_tokens=4000), "ours"), of(make_request(max_tokens=4000), "theirs")
    for _ in range(200):
        seen.observe(theirs, 1000)
    for count in range(1, 21):
        seen.observe(ours, 10)
        expected = 10 if count == 20 else 1000
        assert seen.quantiles(ours)[1] == pytest.approx(expected, rel=0.1)


def test_long_prompts_have_answers_of_their_own(make_request):
    seen = OutputLengths(enough=20)
    short, long = make_request(max_tokens=4000), make_request(prompt_tokens=3000, max_tokens=4000)
    for _ in range(30):
        seen.observe(short, 500)
    assert seen.quantiles(long)[1] == pytest.approx(500, rel=0.1)
    for _ in range(30):
        seen.observe(of(long, "somebody"), 20)
    assert seen.quantiles(long)[1] == pytest.approx(20, rel=0.1)
    assert seen.quantiles(short)[1] == pytest.approx(500, rel=0.1)
    assert [prompt_bin(tokens) for tokens in (1, 511, 512, 2047, 2048, 8191, 8192)] == [0, 0, 1, 1, 2, 2, 3]


def test_what_was_seen_last_counts_most(make_request):
    seen, request = OutputLengths(window=100), make_request(max_tokens=4000)
    for length in (1000,) * 500 + (10,) * 150:
        seen.observe(request, length)
    assert seen.quantiles(request)[1] == pytest.approx(10, abs=1)


def test_tenants_are_bounded(make_request):
    seen, request = OutputLengths(max_kinds=50), make_request()
    for index in range(500):
        seen.observe(of(request, f"tenant-{index}"), 10)
    assert len(seen) == 50


def test_what_is_known_is_said(make_request):
    seen, request = OutputLengths(), make_request(max_tokens=70)
    assert not seen.knows(request)
    assert seen.knows(make_request(max_tokens=70, min_tokens=70)), "the request itself says so"
    seen.observe(request, 20)
    assert seen.knows(request)
    outlived = replace(request, answered=tuple(range(40)))
    assert (seen.knows(outlived), seen.quantiles(outlived)) == (False, (30, 30, 30))
