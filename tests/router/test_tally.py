"""What has become of requests."""

from __future__ import annotations

from dataclasses import replace

from router.requests import Details, Outcome
from router.slo import SloLimits
from router.tally import RECENT_REQUESTS, Quantiles, RecentTimes, Tally

DETAILS = Details(
    request_id="r", prefill_worker="p", decode_worker="d", attempt=1, kv_bytes=0, ttft_s=1.0, tpot_s=0.1,
    duration_s=2.0, stages={}, outcome=Outcome.GOOD, slo_class="default", limits=SloLimits(1.0, 1.0),
    placement="local",
)  # fmt: skip


def test_quantiles_are_of_what_was_measured():
    times = RecentTimes()
    assert times.quantiles() == Quantiles(0.0, 0.0, 0.0)
    times.add(3.0)
    assert times.quantiles() == Quantiles(3.0, 3.0, 3.0)
    for value in range(100, 0, -1):
        times.add(float(value))
    assert times.quantiles() == Quantiles(50.0, 90.0, 99.0)


def test_only_the_latest_count():
    times = RecentTimes()
    for value in range(3 * RECENT_REQUESTS):
        times.add(1.0 if value < 2 * RECENT_REQUESTS else 2.0)
    assert times.quantiles() == Quantiles(2.0, 2.0, 2.0)


def test_outcomes_by_class():
    tally = Tally()
    tally.ended(DETAILS, 10)
    tally.ended(replace(DETAILS, outcome=Outcome.ERROR, ttft_s=None), 0)
    tally.ended(replace(DETAILS, slo_class="batch", outcome=Outcome.TPOT_MISS, tpot_s=0.5), 10)
    tally.rejected("batch")
    assert tally.by_class() == {
        "default": {Outcome.GOOD: 1, Outcome.ERROR: 1},
        "batch": {Outcome.TPOT_MISS: 1, Outcome.REJECTED: 1},
    }
    assert tally.outcomes == dict.fromkeys(
        (Outcome.GOOD, Outcome.ERROR, Outcome.TPOT_MISS, Outcome.REJECTED), 1
    )


def test_times_of_answers_that_have_them():
    tally = Tally()
    tally.ended(replace(DETAILS, outcome=Outcome.CANCELLED), 10)
    assert tally.ttft.quantiles().p50_s == 1.0
    assert tally.tpot.quantiles().p50_s == 0.0  # it was cut off
    tally.ended(replace(DETAILS, tpot_s=0.0), 1)
    assert tally.tpot.quantiles().p50_s == 0.0  # there is none between one token
    tally.ended(DETAILS, 2)
    assert tally.tpot.quantiles().p50_s == 0.1
